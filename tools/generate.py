"""Continue prompts with a model; `megatron-moe generate` is the same."""

import sys

from moe_app.cli import generate

if __name__ == "__main__":
    sys.exit(generate())
