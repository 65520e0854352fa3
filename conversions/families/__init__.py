"""Families of Hugging Face models: tables of their config keys and tensor names."""
