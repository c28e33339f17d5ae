"""Starts pretraining as a module: `torchrun -m moe_app.pretrain ...`."""

import sys

from moe_app.pretrain import start

if __name__ == "__main__":
    sys.exit(start())
