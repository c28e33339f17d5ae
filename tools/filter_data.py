"""Filter and deduplicate documents; `megatron-moe filter` is the same."""

import sys

from moe_app.cli import filter_data

if __name__ == "__main__":
    sys.exit(filter_data())
