"""Make a corpus of this Python installation's text; `megatron-moe build-corpus` is the same."""

import sys

from moe_app.cli import build_corpus

if __name__ == "__main__":
    sys.exit(build_corpus())
