"""Trains with two forked ranks, again and again, and kills one of them in the middle of a save.

Usage: python kill_training_worker.py ROOT KILLS FLAGS.json

Every attempt continues ROOT/run, which saves after each step; two in four save in the background.
Prints one JSON line per attempt:
{"rank": killed, "during": iteration being saved} and, after the last kill, trains to the end.
Ranks are forked from one process that has imported everything, so that an attempt costs seconds.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.distributed.faults_worker import fork_ranks


def await_save(run: Path, older: set[str], deadline: float) -> str:
    """Wait until a temporary directory of a new save appears; returns its name."""
    while time.monotonic() < deadline:
        found = {path.name for path in run.glob("iter_*.tmp-*")} - older
        if found:
            return found.pop()
        time.sleep(0.0005)
    raise TimeoutError("no save began")


def main() -> None:
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    training = {"flags": json.loads(Path(sys.argv[3]).read_text()), "log": str(root / "log")}
    run = root / "run"
    moments = random.Random(5)
    for attempt in range(kills):
        older = {path.name for path in run.glob("iter_*.tmp-*")}
        more = ["--async-save"] if attempt % 4 >= 2 else []  # both ranks are killed under both
        children = fork_ranks({**training, "flags": [*training["flags"], *more]})
        # The second save of the attempt, so that a step was trained in between.
        deadline = time.monotonic() + 240
        first = await_save(run, older, deadline)
        begun = time.monotonic()
        during = await_save(run, {*older, first}, deadline)
        # Within a step and a save, or the run would end before all kills on a fast machine.
        time.sleep(moments.uniform(0.0, 0.8) * (time.monotonic() - begun))
        victim = attempt % 2
        os.kill(children[victim], signal.SIGKILL)
        time.sleep(0.2)
        os.kill(children[1 - victim], signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        print(json.dumps({"rank": victim, "during": during}), flush=True)
    statuses = [os.waitpid(child, 0)[1] for child in fork_ranks(training)]
    print(json.dumps({"statuses": statuses}), flush=True)


if __name__ == "__main__":
    main()
