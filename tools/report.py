"""Sum up a run; compare its losses with the unigram entropy; `megatron-moe report` is the same."""

import sys

from moe_app.cli import report

if __name__ == "__main__":
    sys.exit(report())
