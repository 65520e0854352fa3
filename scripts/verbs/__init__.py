"""The implementation of every command; its options are in `lordjax.scripts.flags`."""
