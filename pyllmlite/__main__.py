"""``python -m pyllmlite`` is the command ``pyllmlite``."""

from pyllmlite.cli.main import main

if __name__ == "__main__":
    main()
