"""Tokenize JSON lines into Megatron's token files; `megatron-moe preprocess` is the same."""

import sys

from moe_app.cli import preprocess_data

if __name__ == "__main__":
    sys.exit(preprocess_data())
