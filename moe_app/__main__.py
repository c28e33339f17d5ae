"""Starts a command as a module: `torchrun -m moe_app pretrain ...`."""

import sys

from moe_app.cli import main

if __name__ == "__main__":
    sys.exit(main())
