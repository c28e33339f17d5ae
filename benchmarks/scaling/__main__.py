"""Starts a sweep: `python -m benchmarks.scaling --sweep NAME`."""

import sys

from benchmarks.scaling.cli import main

if __name__ == "__main__":
    sys.exit(main())
