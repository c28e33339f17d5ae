"""Decide whether a job is restarted; `megatron-moe requeue` is the same."""

import sys

from moe_app.cli import requeue

if __name__ == "__main__":
    sys.exit(requeue())
