"""Trains with two forked ranks, again and again, each time with another thing going wrong.

Usage: python faults_worker.py PLAN.json

PLAN.json: [{"flags": [...], "log": FILE, "fault": {...} or null}, ...], an attempt each. A fault
has `rank` and `kind`:

* `kill`: SIGKILL `after` seconds from when the rank first enters `stage`, at `iteration` or later;
* `signal`: that signal to the rank itself on entering `stage`;
* `fork`: a second run of the same flags begins when the first is at `stage`.

Stages: `data`, `step`, `evaluation`, `save`. Prints one JSON line per attempt: the statuses of both
ranks, and the seconds it took. Ranks are forked from one process that has imported everything, so
that an attempt costs a second or two.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.trainer import loop, resume
from megatron.trainer.hooks import journal
from moe_app.pretrain import build, command
from tests.distributed.ports import free_port
from tests.paths import REPO

PATIENCE_S = 180


def arm(stage: str, iteration: int, action: Callable[[], None]) -> None:
    """Call `action` once, when this process enters `stage` after `iteration` steps or more."""
    done: list[bool] = []

    def wrap(function: Callable[..., Any], steps: Callable[..., int]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if not done and steps(*arguments) >= iteration:
                done.append(True)
                action()
            return function(*arguments, **named)

        return wrapped

    if stage == "data":
        build.build_data = wrap(build.build_data, lambda *_: iteration)
    elif stage == "step":
        loop.train_step = wrap(loop.train_step, lambda state, _: state.iteration)
    elif stage == "evaluation":
        loop.evaluate = wrap(loop.evaluate, lambda state, *_: state.iteration)
    elif stage == "save":
        resume.save_checkpoint = wrap(resume.save_checkpoint, lambda _root, steps, *_: steps)
    else:
        raise ValueError(stage)


def prepare(fault: dict[str, Any], attempt: dict[str, Any]) -> None:
    me = os.getpid()
    iteration = fault.get("iteration", 0)
    if fault["kind"] == "kill":

        def kill_later() -> None:
            timer = threading.Timer(fault["after"], lambda: os.kill(me, signal.SIGKILL))
            timer.daemon = True
            timer.start()

        arm(fault["stage"], iteration, kill_later)
    elif fault["kind"] == "signal":
        number = signal.Signals[fault["signal"]]
        arm(fault["stage"], iteration, lambda: os.kill(me, number))
    elif fault["kind"] == "fork":
        arm(fault["stage"], iteration, lambda: second_run(attempt))
    else:
        raise ValueError(fault["kind"])


def second_run(attempt: dict[str, Any]) -> None:
    """The same command again, as one process; its status goes to a file beside the log."""
    child = os.fork()
    if child == 0:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        command = [sys.executable, str(REPO / "tools" / "pretrain.py"), *attempt["flags"]]
        command += ["--expert-model-parallel-size", "1"]
        descriptor = os.open(f"{attempt['log']}.second", os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 2)
        os.execv(command[0], command)
    _, status = os.waitpid(child, 0)
    Path(f"{attempt['log']}.status").write_text(str(os.waitstatus_to_exitcode(status)))


def fork_ranks(attempt: dict[str, Any]) -> list[int]:
    port = free_port()
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            descriptor = os.open(attempt["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            status = 1
            try:
                fault = attempt.get("fault")
                if fault is not None and fault["rank"] == rank:
                    prepare(fault, attempt)
                status = command.main(attempt["flags"])
            except BaseException as error:
                sys.stderr.write(f"rank {rank}: {type(error).__name__}: {error}\n")
            finally:
                os._exit(status)
        children.append(child)
    return children


def await_all(children: list[int]) -> list[int | None]:
    """Exit codes of the ranks; None for one that had to be killed because it went on for ever."""
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(codes) < len(children):
        for child in children:
            if child in codes:
                continue
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = None
        time.sleep(0.02)
    return [codes[child] for child in children]


def main() -> None:
    journal.LOCK_PATIENCE_S = 2.0
    for attempt in json.loads(Path(sys.argv[1]).read_text()):
        started = time.monotonic()
        codes = await_all(fork_ranks(attempt))
        seconds = round(time.monotonic() - started, 1)
        print(json.dumps({"codes": codes, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
