"""``python -m gibbsian`` is the command line."""

from gibbsian.cli import main

if __name__ == "__main__":
    main()
