"""``python -m foldbit`` is the command ``foldbit``."""

from foldbit.cli import main

if __name__ == "__main__":
    main()
