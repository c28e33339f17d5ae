"""Train and compare variants of a recipe; `megatron-moe ablate` is the same."""

import sys

from moe_app.cli import ablate

if __name__ == "__main__":
    sys.exit(ablate())
