"""Starts pretraining as a module: `torchrun -m moe_app.pretrain ...`."""

import sys

from moe_app.cli import pretrain

if __name__ == "__main__":
    sys.exit(pretrain())
