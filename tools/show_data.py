"""Show conversations as a model sees them; `megatron-moe show-data` is the same."""

import sys

from moe_app.cli import show_data

if __name__ == "__main__":
    sys.exit(show_data())
