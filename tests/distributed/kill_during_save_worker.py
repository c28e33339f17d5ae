"""Two gloo ranks that keep saving until one is killed; prints what was found afterwards.

Usage: kill_during_save_worker.py {kill,full-disk} ROOT SEED

One process imports everything and forks the ranks of every round, which costs milliseconds instead
of seconds. A rank dies by SIGKILL: from outside after a seeded delay, or by its own hand at a named
moment, for which the function at that moment is wrapped. One JSON object a round goes to stdout.
"""

import errno
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron.trainer.checkpoint import find_checkpoint, layout, load_checkpoint, save_checkpoint
from megatron.trainer.checkpoint import save as save_module
from megatron.trainer.errors import CheckpointError
from megatron.trainer.runtime.cpu_backend import redirect_cuda

WORLD_SIZE = 2
TENSORS = 4
ROWS = 1 << 17
"""Floats of one tensor on one rank: 512 KiB; 4 MiB in all."""
SURVIVOR_S = 5.0
"""How long the other rank may take to notice, seconds."""


@dataclass(frozen=True)
class Moment:
    """When a round ends: `victim` dies in the `save`-th save of the round."""

    name: str
    victim: int
    save: int = 2
    patch: Callable[[], None] | None = None
    """Arms the victim, called in it; None: the driver kills after `delay_s`."""
    delay_s: float = 0.0


@dataclass
class Round:
    """What one round left behind."""

    moment: str
    started: int
    """Iteration of the save in which the rank died."""
    completed: int
    """Iteration of the last save that returned on rank 0."""
    left: list[str]
    """Names in the directory after the kill."""
    found: list[int]
    """Iteration that find_checkpoint gave, by rank."""
    values: list[float]
    """Every distinct number in tensors, objects and the unsharded state, over both ranks."""


def die(*_args: Any, **_kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(module: Any, name: str) -> Callable[[], None]:
    """Arms a death on entering `module.name`."""
    return lambda: setattr(module, name, die)


def after(
    module: Any, name: str, when: Callable[..., bool] = lambda *_: True
) -> Callable[[], None]:
    """Arms a death on leaving `module.name`, if `when` its arguments say so."""

    def arm() -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if when(*args):
                die()
            return result

        setattr(module, name, wrapped)

    return arm


def moments(seed: int, save_s: float) -> list[Moment]:
    """Seven named moments, all on the rank that does the step, and six of chance."""

    def is_set_aside(_path: Path, target: Path) -> bool:
        return ".replaced-" in target.name

    named = [
        Moment("before the shards", 1, patch=before(save_module, "_write_shards")),
        Moment("after the shards", 0, patch=after(save_module, "_write_shards")),
        Moment("before the manifest", 0, patch=before(save_module, "write_manifest")),
        Moment("before the rename", 0, patch=before(layout, "publish")),
        Moment("between rename and tracker", 0, patch=after(layout, "publish")),
        Moment("before the tracker is replaced", 0, patch=before(os, "replace")),
        Moment(
            "between the renames of a replacement",
            0,
            save=1,
            patch=after(Path, "rename", is_set_aside),
        ),
    ]
    rng = random.Random(seed)
    chance = [
        # one in each sixth of a save, and for either rank
        Moment(f"by chance {i}", i % 2, delay_s=save_s * (i + rng.random()) / 6)
        for i in range(6)
    ]
    return named + chance


def make_state(rank: int, value: float) -> dict[str, Any]:
    """4 MiB over two ranks, all of it `value`."""
    tensors = {
        f"t{i}": ShardedTensor.from_rank_offsets(
            f"t{i}", torch.full((ROWS,), value), (0, rank, WORLD_SIZE)
        )
        for i in range(TENSORS)
    }
    own = ShardedObject("rng", {"state": torch.full((8,), value)}, (WORLD_SIZE,), (rank,))
    return {"model": tensors, "rng": own, "iteration": int(value)}


def rank_process(rank: int, store: Path, log: Path, work: Callable[[int], None]) -> int:
    """Fork one rank that joins the others, does `work` and exits; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        shared = dist.FileStore(str(store), WORLD_SIZE)
        dist.init_process_group("gloo", store=shared, rank=rank, world_size=WORLD_SIZE)
        work(rank)
        status = 0
    except BaseException:  # the process ends here, whatever it was
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def fork_ranks(scratch: Path, work: Callable[[int], None]) -> list[int]:
    """Start both ranks on `work`."""
    store = scratch / f"store-{time.monotonic_ns()}"
    return [rank_process(r, store, scratch / "stderr", work) for r in range(WORLD_SIZE)]


def wait(pid: int, timeout_s: float) -> int | None:
    """Exit status of a child; None if it still runs after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)
    return None


def run_to_end(scratch: Path, work: Callable[[int], None]) -> None:
    """Run `work` on both ranks; both must end well."""
    for pid in fork_ranks(scratch, work):
        if wait(pid, 60.0) != 0:
            raise RuntimeError((scratch / "stderr").read_text()[-3000:])


def keep_saving(
    rank: int, root: Path, journal: Path, first: int, tag: int, moment: Moment | None = None
) -> None:
    """Save iterations from `first` on until death; without a moment to die, three of them.

    Every save writes a number of its own, iteration * 100 + tag, so that a mixture shows.
    """
    descriptor = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for turn in range(3 if moment is None else 100):
        iteration = first + turn
        is_last = moment is not None and rank == moment.victim and turn + 1 == moment.save
        if is_last and moment is not None and moment.patch is not None:
            moment.patch()
        if rank == 0:
            os.write(descriptor, f"start {iteration} {time.monotonic()}\n".encode())
        save_checkpoint(root, iteration, make_state(rank, iteration * 100 + tag), keep_last=3)
        if rank == 0:
            os.write(descriptor, f"end {iteration} {time.monotonic()}\n".encode())


def read_journal(journal: Path) -> list[tuple[str, int, float]]:
    if not journal.exists():
        return []
    rows = [line.split() for line in journal.read_text().splitlines()]
    return [(what, int(iteration), float(at)) for what, iteration, at in rows]


def kill_when_due(pids: list[int], journal: Path, moment: Moment) -> None:
    """Kill the victim, unless it does it itself; then see the other one off."""
    victim, other = pids[moment.victim], pids[1 - moment.victim]
    if moment.patch is None:
        deadline = time.monotonic() + 120.0
        while sum(row[0] == "start" for row in read_journal(journal)) < moment.save:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{moment.name}: the save never began")
            time.sleep(0.0005)
        time.sleep(moment.delay_s)
        os.kill(victim, signal.SIGKILL)
    status = wait(victim, 120.0)
    if status is None or not os.WIFSIGNALED(status):
        raise RuntimeError(f"{moment.name}: the victim ended with {status}, not by its signal")
    if wait(other, SURVIVOR_S) is None:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)


def numbers_in(loaded: Any) -> set[float]:
    """Every distinct number in a loaded state."""
    if isinstance(loaded, torch.Tensor):
        return set(loaded.unique().tolist())
    if isinstance(loaded, dict):
        return set().union(*(numbers_in(value) for value in loaded.values()))
    return {float(loaded)}


def examine(rank: int, root: Path, report: Path) -> None:
    """Find and load, and write down what came out."""
    found = find_checkpoint(root)
    loaded = load_checkpoint(found.path, make_state(rank, -1.0))
    content = {"found": found.iteration, "values": sorted(numbers_in(loaded))}
    report.with_suffix(f".{rank}").write_text(json.dumps(content))


def kill_rounds(root: Path, scratch: Path, seed: int) -> None:
    """Calibrate with three saves left in peace, then one round a moment."""
    journal = scratch / "journal"
    run_to_end(scratch, lambda rank: keep_saving(rank, root, journal, 1, 0))
    rows = read_journal(journal)
    save_s = (rows[-1][2] - rows[0][2]) / 3
    first = rows[-1][1]
    for tag, moment in enumerate(moments(seed, save_s), start=1):
        journal.unlink()
        # The first save of a round replaces the checkpoint that the last one ended with.
        begin = first
        work = partial(keep_saving, root=root, journal=journal, first=begin, tag=tag, moment=moment)
        kill_when_due(fork_ranks(scratch, work), journal, moment)
        rows = read_journal(journal)
        left = sorted(os.listdir(root))
        run_to_end(scratch, lambda rank: examine(rank, root, scratch / "report"))
        reports = [json.loads((scratch / f"report.{r}").read_text()) for r in range(WORLD_SIZE)]
        found = [report["found"] for report in reports]
        result = Round(
            moment=moment.name,
            started=max(row[1] for row in rows if row[0] == "start"),
            completed=max((row[1] for row in rows if row[0] == "end"), default=begin),
            left=left,
            found=found,
            values=sorted({value for report in reports for value in report["values"]}),
        )
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        first = found[0]


def save_on_full_disk(rank: int, root: Path, report: Path) -> None:
    """Save once in peace; then rank 1's disk is full, and both ranks say what they saw."""
    save_checkpoint(root, 1, make_state(rank, 1))

    def full(_descriptor: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == 1:
        os.fsync = full  # type: ignore[assignment]  # the parameter is called fd there
    error = None
    try:
        save_checkpoint(root, 2, make_state(rank, 2))
    except CheckpointError as raised:
        error = str(raised)
    report.with_suffix(f".{rank}").write_text(json.dumps({"error": error}))


def full_disk(root: Path, scratch: Path) -> None:
    """What both ranks raised, and what is there afterwards."""
    run_to_end(scratch, lambda rank: save_on_full_disk(rank, root, scratch / "error"))
    errors = [json.loads((scratch / f"error.{r}").read_text())["error"] for r in range(WORLD_SIZE)]
    run_to_end(scratch, lambda rank: examine(rank, root, scratch / "report"))
    reports = [json.loads((scratch / f"report.{r}").read_text()) for r in range(WORLD_SIZE)]
    content = {"errors": errors, "reports": reports, "left": sorted(os.listdir(root))}
    sys.stdout.write(json.dumps(content) + "\n")


def main(argv: list[str]) -> None:
    mode, root, seed = argv[0], Path(argv[1]), int(argv[2])
    torch.set_num_threads(1)
    redirect_cuda()
    scratch = root.with_name(f"{root.name}-scratch")
    scratch.mkdir(parents=True)
    if mode == "kill":
        kill_rounds(root, scratch, seed)
    else:
        full_disk(root, scratch)


if __name__ == "__main__":
    main(sys.argv[1:])
