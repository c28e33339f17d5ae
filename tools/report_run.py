"""Write one HTML page on one or several runs; `megatron-moe report-run` is the same."""

import sys

from moe_app.cli import report_run

if __name__ == "__main__":
    sys.exit(report_run())
