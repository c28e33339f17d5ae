"""Pretrain or anneal a model; `megatron-moe pretrain` is the same."""

import sys

from moe_app.cli import pretrain

if __name__ == "__main__":
    sys.exit(pretrain())
