"""Fine-tune a model on conversations; `megatron-moe finetune` is the same."""

import sys

from moe_app.cli import finetune

if __name__ == "__main__":
    sys.exit(finetune())
