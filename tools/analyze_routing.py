"""Analyse what a model's routers learned; `megatron-moe analyze` is the same."""

import sys

from moe_app.cli import analyze_routing

if __name__ == "__main__":
    sys.exit(analyze_routing())
