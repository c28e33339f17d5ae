"""Train a SentencePiece or byte-level BPE tokenizer; `megatron-moe train-tokenizer` is the same."""

import sys

from moe_app.cli import train_tokenizer

if __name__ == "__main__":
    sys.exit(train_tokenizer())
