"""Devices, processes, progress, scheduling and operation counts."""
