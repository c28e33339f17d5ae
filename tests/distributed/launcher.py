"""Starts ranks on this machine and reads back what they did."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.paths import REPO

HERE = Path(__file__).parent

TINY = {
    "num-layers": 4,
    "hidden-size": 48,
    "num-attention-heads": 6,
    "num-query-groups": 2,
    "num-experts": 6,
    "moe-router-topk": 3,
    "moe-ffn-hidden-size": 20,
    "vocab-size": 120,
    "seq-length": 16,
    "micro-batch-size": 2,
    "global-batch-size": 8,
    "train-iters": 5,
    "lr": 0.003,
    "min-lr": 0.0003,
    "seed": 7,
    "log-interval": 1,
    "eval-iters": 1,
    "moe-aux-loss-coeff": 0.1,
    "moe-z-loss-coeff": 0.1,
}
"""Odd shapes, losses strong enough to matter."""


LISTS = ("data-path", "rampup-batch-size")
"""Flags that take several values."""


@dataclass(frozen=True)
class Outcome:
    """One case's records and its final weights, assembled from every rank's shards."""

    records: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    error: str | None = None

    def series(self, key: str) -> list[float]:
        return [record[key] for record in self.records if key in record]


def flags(**overrides: Any) -> list[str]:
    """Command-line flags of the tiny model on random tokens, with overrides."""
    settings = {**TINY, **{key.replace("_", "-"): value for key, value in overrides.items()}}
    found = [] if "data-path" in settings else ["--mock-data"]
    for key, value in settings.items():
        if value is True:
            found.append(f"--{key}")
        elif value is not False:
            found += [f"--{key}", *(str(value).split() if key in LISTS else [str(value)])]
    return found


def program(script: str | Path) -> list[str]:
    """Arguments of Python that start a script, as a module if it is one of the tests'."""
    path = Path(script).resolve()
    if not path.is_relative_to(REPO / "tests"):
        return [str(script)]
    return ["-m", ".".join(path.relative_to(REPO).with_suffix("").parts)]


_server: list[subprocess.Popen[str]] = []


class Ended(subprocess.CompletedProcess[str]):
    """Processes that have ended; `returncode` is 1 if any of them failed."""

    codes: list[int]
    """The exit status of each, by rank; negative for a signal."""


def ranks(num_ranks: int, script: str | Path, *arguments: str, timeout: float = 300) -> Ended:
    """Run a script as several ranks, one thread each; what `torchrun` does, but without imports.

    The ranks are processes forked from one that has imported the project (fork_server.py).
    """
    return _fork(num_ranks, script, arguments, rank_environment(), REPO, timeout)


def alone(
    script: str | Path,
    *arguments: str,
    cwd: Path = REPO,
    timeout: float = 300,
    **variables: str,
) -> Ended:
    """Run a script as a process that no launcher has started, forked like `ranks`.

    Args:
        script: of the tests or of `tools`.
        arguments: its arguments.
        cwd: where it runs.
        timeout: in seconds; then it is killed with its children.
        variables: more of its environment.
    """
    done = _fork(0, script, arguments, {**rank_environment(), **variables}, cwd, timeout)
    (done.returncode,) = done.codes
    return done


def _fork(
    num_ranks: int,
    script: str | Path,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    cwd: Path,
    timeout: float,
) -> Ended:
    if not _server:
        _server.append(_start_server())
        atexit.register(_stop_server)
    with tempfile.TemporaryDirectory(prefix="ranks-") as where:
        said = {name: Path(where) / name for name in ("stdout", "stderr")}
        request = {
            "ranks": num_ranks,
            "script": str(script),
            "arguments": arguments,
            "environment": environment,
            "cwd": str(cwd),
            "timeout": timeout,
            **{name: str(path) for name, path in said.items()},
        }
        server = _server[0]
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        stdout, stderr = (
            path.read_text(errors="replace") if path.exists() else "" for path in said.values()
        )
    command = [str(script), *arguments]
    if answer["timed_out"]:
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
    done = Ended(command, int(any(answer["codes"])), stdout, stderr)
    done.codes = answer["codes"]
    return done


def _start_server() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *program(HERE / "fork_server.py")],
        env=rank_environment(),
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _stop_server() -> None:
    server = _server.pop()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.close()
    server.wait()
    server.stdout.close()


def rank_environment() -> dict[str, str]:
    """This process's environment, as ranks of a test get it."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(
    num_ranks: int, script: str | Path, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script under torchrun on this machine, one thread a rank."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(num_ranks), *program(script), *arguments),
    ]
    return run_session(command, rank_environment(), timeout=timeout)


def run_session(
    command: list[str], environment: dict[str, str], *, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a command; at the timeout, end it with all its children, ranks that hang included."""
    with subprocess.Popen(
        command,
        env=environment,
        cwd=REPO,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def run_cases(
    num_ranks: int,
    cases: dict[str, list[str]],
    out: Path,
    *,
    bucket_size: int | None = None,
    timeout: float = 400,
) -> dict[str, Outcome]:
    """Train every case on `num_ranks` ranks, in one launch.

    Args:
        num_ranks: of the launch.
        cases: command-line flags by name.
        out: where ranks write.
        bucket_size: values that megatron-core reduces and gathers at a time where it overlaps;
            None leaves it to megatron-core, whose buckets hold all of a tiny model.
        timeout: in seconds, of all cases.
    """
    out.mkdir(parents=True, exist_ok=True)
    listing = [
        {"name": name, "flags": case, "bucket_size": bucket_size} for name, case in cases.items()
    ]
    file = out / "cases.json"
    file.write_text(json.dumps(listing))
    done = ranks(num_ranks, HERE / "worker_train.py", str(file), str(out), timeout=timeout)
    assert done.returncode == 0, done.stderr[-6000:]
    return {name: read_outcome(out, name) for name in cases}


def read_outcome(out: Path, name: str) -> Outcome:
    records = json.loads((out / f"{name}.json").read_text())
    if isinstance(records, dict):
        return Outcome(records=[], weights={}, error=records["error"])
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob(f"{name}.rank*.pt")):
        for key, shape, offset, tensor in torch.load(file, weights_only=True):
            full = weights.setdefault(key, torch.full(shape, torch.nan))
            window = tuple(
                slice(start, start + size) for start, size in zip(offset, tensor.shape, strict=True)
            )
            full[window] = tensor
    return Outcome(records=records, weights=weights)
