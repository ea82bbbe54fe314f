"""``python -m klkit``: the command line."""

from klkit.cli import main

if __name__ == "__main__":
    main()
