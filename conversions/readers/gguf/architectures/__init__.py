"""The supported GGUF architectures: one row each, in `registry`."""
