#!/usr/bin/env python3
"""Replaces python, torchrun and the trainer in tests of the batch script alone.

Records its arguments and acts on STAND_IN: `finish`, `stop` as after a signal, or `wait` for one.
Each start that does not `stop` saves one more step.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

run = Path(sys.argv[sys.argv.index("--save") + 1])
tracker = run / "latest_checkpointed_iteration.txt"
mode = os.environ["STAND_IN"]
received: list[int] = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(number))

node, restart = os.environ["SLURMD_NODENAME"], os.environ.get("SLURM_RESTART_COUNT", "0")
call = {"arguments": sys.argv[1:], "has_metrics": (run / "metrics.jsonl").exists()}
(run / f"called-{restart}-{node}.tmp").write_text(json.dumps(call))
(run / f"called-{restart}-{node}.tmp").rename(run / f"called-{restart}-{node}.json")
if node == "n0":
    (run / "metrics.jsonl").touch()
    while mode == "wait" and not received:
        time.sleep(0.05)
    saved = int(tracker.read_text()) if tracker.exists() else 0
    if mode != "stop":
        saved += 1
        (run / f"iter_{saved:07}").mkdir()
        tracker.write_text(str(saved))
    ended = {"reason": "finished", "detail": "", "requeue": False}
    if mode != "finish":
        ended = {"reason": "signal", "detail": f"signals {received}", "requeue": True}
    ended |= {"iteration": saved, "train_iters": 9}
    (run / "ended.json").write_text(json.dumps(ended))
