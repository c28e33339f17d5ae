"""Says whether a SLURM job that trained should be started again.

    python3 moe_app/slurm/requeue.py begin RUN --job ID                    before training
    python3 moe_app/slurm/requeue.py end RUN --job ID --status STATUS      after it

`end` goes by what the trainer left in its run directory, because torchrun turns every exit status
into 1. It ends with 0 when the run is done, 75 when it stopped early and should go on, 1 when it
failed. `begin` counts the starts of a job, its own restarts and SLURM's alike, and ends with 1 when
there are too many, or too many in a row that saved nothing new.

Needs Python 3.7 and nothing else: it runs on the node itself, outside any container.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

DONE, FAILED, REQUEUE = 0, 1, 75
"""Exit statuses; 75 is EX_TEMPFAIL of sysexits.h."""

ENDED = "ended.json"
TRACKER = "latest_checkpointed_iteration.txt"
STATE = "requeue.json"
_NUMBER = re.compile("[0-9]{1,18}")


class BadRunError(Exception):
    """The run directory holds something that cannot be read."""


class State(NamedTuple):
    """What is known of the starts of a job; kept in the run directory."""

    job: str
    """The job that trains here."""
    restarts: int
    """How often it was started again."""
    stalled: int
    """How many of its last starts found no newer checkpoint than the start before."""
    saved: int
    """Iteration of the newest checkpoint at the last start, 0 without one."""


class Limits(NamedTuple):
    """How often a job may be started again."""

    restarts: int
    """In all."""
    stalled: int
    """In a row without a newer checkpoint."""


def main(argv: list[str] | None = None, *, prog: str = "requeue.py") -> int:
    """Do as `argv` says; returns the exit status."""
    args = parse_args(argv, prog)
    limits = Limits(args.max_restarts, args.max_stalled)
    try:
        if args.moment == "begin":
            status, message = begin(args.run, args.job, limits)
        else:
            status, message = end(args.run, args.job, args.status, limits)
    except (BadRunError, OSError) as error:
        status, message = FAILED, str(error)
    print(_printable(message), file=sys.stderr if status == FAILED else sys.stdout, flush=True)
    return status


def parse_args(argv: list[str] | None, prog: str) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Says whether a SLURM job that trained should be restarted."
    )
    moments = parser.add_subparsers(dest="moment", required=True)
    before = moments.add_parser("begin", help="before training; status 1: do not train")
    after = moments.add_parser("end", help="after it; status 0: done, 75: restart, 1: failed")
    after.add_argument(
        "--status", type=int, required=True, metavar="N", help="exit status of the training step"
    )
    for moment in (before, after):
        moment.add_argument("run", type=Path, metavar="RUN", help="the run directory, --save")
        moment.add_argument("--job", required=True, metavar="ID", help="the SLURM job's id")
        moment.add_argument(
            "--max-restarts",
            type=_count,
            default=100,
            metavar="N",
            help="restarts of a job, whoever asks for them (%(default)s)",
        )
        moment.add_argument(
            "--max-stalled",
            type=_count,
            default=3,
            metavar="N",
            help="restarts in a row that find no newer checkpoint (%(default)s)",
        )
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 on")
    return int(text)


def _printable(text: str) -> str:
    """The text without what a terminal would obey; ends of lines stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def begin(run: Path, job: str, limits: Limits) -> tuple[int, str]:
    """Count a start, and take away what an earlier one said about its end.

    Returns:
        Exit status and message.

    Raises:
        BadRunError: a file of the run is damaged.
        OSError: the run directory cannot be read or written.
    """
    if not run.is_dir():
        raise BadRunError(f"there is no run directory {run}; make it before the job begins")
    state = next_state(_read_state(run), job, _read_saved(run))
    refusal = _refusal(state, limits)
    if refusal is not None:
        return FAILED, refusal
    _write_state(run, state)
    if (run / ENDED).exists():
        (run / ENDED).unlink()
    start = "starts" if not state.restarts else f"starts, restart {state.restarts}"
    return DONE, f"job {job} {start}; newest checkpoint: {state.saved or 'none'}"


def end(run: Path, job: str, status: int, limits: Limits) -> tuple[int, str]:
    """Decide, from what the trainer wrote when it ended.

    Args:
        run: the run directory.
        job: the job's id.
        status: exit status of the training step.
        limits: of restarts.

    Returns:
        Exit status and message.

    Raises:
        BadRunError: a file of the run is damaged.
        OSError: the run directory cannot be read.
    """
    ended = _read_ended(run)
    if ended is None:
        return FAILED, (
            f"training ended with status {status} and without a word in {run / ENDED}: a process"
            " was killed, or could not start; see the nodes' logs"
        )
    reason = f"{ended['reason']}: {ended.get('detail') or 'no detail'}"
    where = f"iteration {ended.get('iteration')} of {ended.get('train_iters')}"
    if ended["requeue"]:
        # Processes that a signal ended have another status than 0; the checkpoint counts.
        refusal = _refusal(next_state(_read_state(run), job, _read_saved(run)), limits)
        if refusal is not None:
            return FAILED, f"stopped at {where} ({reason}); {refusal}"
        return REQUEUE, f"stopped at {where} ({reason}); to be started again"
    if ended["reason"] == "error":
        return FAILED, f"failed: {ended.get('detail') or 'no detail'}"
    if status != 0:
        return FAILED, (
            f"the trainer ended at {where} ({reason}), but the training step with status {status};"
            " see the nodes' logs"
        )
    return DONE, f"ended at {where} ({reason})"


def next_state(before: State | None, job: str, saved: int) -> State:
    """The state that one more start of `job` leads to.

    Args:
        before: at the last start in this run directory, if there was one.
        job: the job that starts; another one than before starts counting anew.
        saved: iteration of the newest checkpoint now.
    """
    if before is None or before.job != job:
        return State(job=job, restarts=0, stalled=0, saved=saved)
    stalled = 0 if saved > before.saved else before.stalled + 1
    return State(job=job, restarts=before.restarts + 1, stalled=stalled, saved=saved)


def _refusal(state: State, limits: Limits) -> str | None:
    """Why a start that leads to `state` must not be, if it must not."""
    if state.restarts > limits.restarts:
        return (
            f"job {state.job} was restarted {state.restarts - 1} times, which is the limit"
            f" (--max-restarts {limits.restarts}); submit it anew if that is right"
        )
    if state.stalled > limits.stalled:
        return (
            f"{state.stalled} restarts of job {state.job} in a row have saved nothing newer than"
            f" iteration {state.saved} (--max-stalled {limits.stalled}), so another would not"
            " either; see the nodes' logs, then submit it anew"
        )
    return None


def _read_ended(run: Path) -> dict[str, Any] | None:
    found = _read_json(run / ENDED)
    if found is None:
        return None
    if not isinstance(found.get("reason"), str) or not isinstance(found.get("requeue"), bool):
        raise BadRunError(f"{run / ENDED} lacks a reason and whether to requeue: {found}")
    return found


def _read_saved(run: Path) -> int:
    path = run / TRACKER
    if not path.exists():
        return 0
    text = _read(path).strip()
    if not _NUMBER.fullmatch(text):
        raise BadRunError(f"{path} holds {text[:40]!r}; it must be the newest checkpoint's number")
    return int(text)


def _read_state(run: Path) -> State | None:
    found = _read_json(run / STATE)
    if found is None:
        return None
    counts = [found.get(name) for name in _COUNTS]
    are_counts = all(type(count) is int and count >= 0 for count in counts)
    if not isinstance(found.get("job"), str) or not are_counts:
        raise BadRunError(
            f"{run / STATE} must hold job, {', '.join(_COUNTS)}, but holds {found}; remove it, and"
            " restarts are counted from 0"
        )
    return State(job=found["job"], **{name: found[name] for name in _COUNTS})


_COUNTS = ("restarts", "stalled", "saved")


def _write_state(run: Path, state: State) -> None:
    scratch = run / f"{STATE}.tmp"
    scratch.write_text(json.dumps(state._asdict()) + "\n", encoding="utf-8")
    os.replace(str(scratch), str(run / STATE))


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise BadRunError(f"{path} is not JSON: {error}; remove it") from error
    if not isinstance(found, dict):
        raise BadRunError(f"{path} holds no object: {found}; remove it")
    return found


def _read(path: Path) -> str:
    """A file's text; a pipe, say, would keep the job waiting."""
    if not path.is_file():
        raise BadRunError(f"{path} is no ordinary file; remove it")
    return path.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main())
