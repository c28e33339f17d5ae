"""Submit a recipe to SLURM and follow the job; `megatron-moe submit` is the same."""

import sys

from moe_app.cli import submit

if __name__ == "__main__":
    sys.exit(submit())
