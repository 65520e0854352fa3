"""Processes of the sandbox: supervisor, keeper, program and checker, and what confines them.

The supervisor runs without the rest of the package and without installed packages. So these modules
import the standard library only, and little of it, because every program waits for them.
"""
