"""Align a model with preferences; `megatron-moe align` is the same."""

import sys

from moe_app.cli import align

if __name__ == "__main__":
    sys.exit(align())
