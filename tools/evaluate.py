"""Evaluate a checkpoint on tasks of lm-evaluation-harness; `megatron-moe evaluate` is the same."""

import sys

from moe_app.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
