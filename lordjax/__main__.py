"""``python -m lordjax``: the same as the command ``lordjax``."""

from lordjax.scripts.cli import main

if __name__ == "__main__":
    main()
