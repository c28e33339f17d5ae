"""Evaluates, and kills itself before a round of requests.

Usage: kill_evaluation_worker.py ROUND ARGUMENT...; rounds count from 1, and 0 is none
"""

import os
import signal
import sys
from typing import Any

# Imported where they are needed, which would be in each process that is forked of this module's.
import moe_app.evaluate.harness.olmes_run
import moe_app.evaluate.harness.own_run
import moe_app.evaluate.harness.run  # noqa: F401
from moe_app.evaluate import evaluation
from moe_app.evaluate.workers import Workers


def main() -> int:
    rounds: list[None] = []
    compute = Workers._compute

    def killing(self: Workers, work: Any) -> Any:
        rounds.append(None)
        if len(rounds) == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(self, work)

    Workers._compute = killing  # type: ignore[method-assign]
    return evaluation.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
