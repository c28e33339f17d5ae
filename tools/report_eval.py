"""Write evaluations beside the papers' figures; `megatron-moe report-eval` is the same."""

import sys

from moe_app.cli import report_eval

if __name__ == "__main__":
    sys.exit(report_eval())
