"""`python -m protomamba` is the `protomamba` command."""

import sys

from protomamba.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
