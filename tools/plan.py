"""List the layouts that fit a number of GPUs; `megatron-moe plan` is the same."""

import sys

from moe_app.cli import plan

if __name__ == "__main__":
    sys.exit(plan())
