"""Report what data hold; `megatron-moe report-data` is the same."""

import sys

from moe_app.cli import report_data

if __name__ == "__main__":
    sys.exit(report_data())
