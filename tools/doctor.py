"""Check what this machine can do for a run; `megatron-moe doctor` is the same."""

import sys

from moe_app.cli import doctor

if __name__ == "__main__":
    sys.exit(doctor())
