"""`python -m cli`: the command `dinov2`."""

from cli import main

if __name__ == "__main__":
    main()
