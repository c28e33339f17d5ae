"""Forks ranks of a process that has imported everything, so that a launch costs no imports.

Reads requests from standard input, a JSON object a line: `script` and `arguments`, `ranks`, `cwd`,
`environment`, `stdout` and `stderr` (files that are appended to), `timeout`. Answers each with a
line: `codes` of the ranks, and `timed_out`. As under torchrun, the first rank that fails ends the
others. `ranks` 0 asks for one process that no launcher has started.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from megatron.trainer.hooks import plots
from megatron.trainer.runtime import signals
from moe_app.pretrain.config import parse_recipe
from tests.distributed.ports import free_port
from tests.paths import REPO
from tests.undrawn import write_no_pixels

GRACE_S = 10.0
NEEDED = (
    "matplotlib.backends.backend_agg",
    "matplotlib.colors",
    "matplotlib.figure",
    "matplotlib.ticker",
    "moe_app.convert.convert_checkpoint",
    "moe_app.doctor.diagnose",
    "moe_app.infer.generate",
    "moe_app.infer.score",
    "moe_app.pretrain.command",
    "torch.distributed.checkpoint",
)
"""What scripts import later than at their start."""


def import_what_is_needed(script: str) -> None:
    """Import the modules of a worker here, once, rather than in each of its processes."""
    path = Path(script)
    if path.is_relative_to(REPO / "tests"):
        importlib.import_module(".".join(path.relative_to(REPO).with_suffix("").parts))


def rank(request: dict[str, Any], number: int, port: int) -> int:
    """What a rank does in its process; its exit status."""
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["ranks"]:
        os.environ.update(
            RANK=str(number),
            LOCAL_RANK=str(number),
            WORLD_SIZE=str(request["ranks"]),
            LOCAL_WORLD_SIZE=str(request["ranks"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    os.chdir(request["cwd"])
    signals.STARTED = time.monotonic()
    sys.argv = [request["script"], *request["arguments"]]
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(request: dict[str, Any], number: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, descriptor)
        status = rank(request, number, port)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def await_all(children: list[int], *, timeout: float) -> dict[str, Any]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    kill_at = deadline
    timed_out = failed = False
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
        if not failed and any(codes.values()):
            failed, kill_at = True, min(deadline, time.monotonic() + GRACE_S)
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGTERM)
                os.kill(child, signal.SIGCONT)  # or a frozen one would not hear it
        if time.monotonic() > kill_at:
            timed_out = kill_at == deadline
            for child in set(children) - set(codes):
                kill_all(child)
        time.sleep(0.005)
    return {"codes": [codes[child] for child in children], "timed_out": timed_out}


def kill_all(child: int) -> None:
    """Kill a child with what it has started itself."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # before it had a group of its own
        os.kill(child, signal.SIGKILL)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for name in NEEDED:
        importlib.import_module(name)
    plots.write_figure = write_no_pixels
    # The first time takes four times as long.
    parse_recipe(["--mock-data"], prog="warm up", description="")
    for line in sys.stdin:
        request = json.loads(line)
        import_what_is_needed(request["script"])
        port = free_port()
        children = [fork(request, number, port) for number in range(max(1, request["ranks"]))]
        answers.write(json.dumps(await_all(children, timeout=request["timeout"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
