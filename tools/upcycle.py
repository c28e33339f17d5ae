"""Make a mixture of experts of a dense model; `megatron-moe upcycle` is the same."""

import sys

from moe_app.cli import upcycle

if __name__ == "__main__":
    sys.exit(upcycle())
