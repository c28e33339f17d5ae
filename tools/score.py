"""Compute the log-probability of every token of a file; `megatron-moe score` is the same."""

import sys

from moe_app.cli import score

if __name__ == "__main__":
    sys.exit(score())
