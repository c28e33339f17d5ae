"""Watch runs in a terminal; `megatron-moe watch` is the same."""

import sys

from moe_app.cli import watch

if __name__ == "__main__":
    sys.exit(watch())
