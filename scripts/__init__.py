"""The command line, shipped as ``lordjax.scripts``."""
