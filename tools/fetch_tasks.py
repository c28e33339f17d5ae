"""Copy the data of tasks, to evaluate without a network; `megatron-moe fetch-tasks` is the same."""

import sys

from moe_app.cli import fetch_tasks

if __name__ == "__main__":
    sys.exit(fetch_tasks())
