"""Makes `python -m cli` run the command line `dinov2`."""

from cli import main

if __name__ == "__main__":
    main()
