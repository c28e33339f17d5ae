"""Import from and export to Hugging Face; `megatron-moe convert` is the same."""

import sys

from moe_app.cli import convert_checkpoint

if __name__ == "__main__":
    sys.exit(convert_checkpoint())
