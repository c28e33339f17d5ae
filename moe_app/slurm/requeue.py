"""Decides whether a SLURM job that trained should be requeued.

    python3 moe_app/slurm/requeue.py begin RUN --job ID                    before training
    python3 moe_app/slurm/requeue.py end RUN --job ID --status STATUS      after it

`end` reads what the trainer wrote to its run directory, because torchrun turns every exit status
into 1. It exits with 0 when the run is done, 75 when it stopped early and should continue, 1 when
it failed. `begin` counts the starts of a job, whether this script or SLURM requeued it, and exits
with 1 after too many, or too many in a row without a new checkpoint.

Needs only Python 3.7, because it runs on the node itself, outside any container.
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


class RunFileError(Exception):
    """Reports a file of the run directory that cannot be read."""


class State(NamedTuple):
    """Counts the starts of a job; stored in the run directory."""

    job: str
    """Id of the job that trains here."""
    restarts: int
    """Number of restarts."""
    stalled: int
    """Consecutive starts, up to the last, that found no newer checkpoint than the start before."""
    saved: int
    """Iteration of the newest checkpoint at the last start, 0 without one."""


class Limits(NamedTuple):
    """Limits the restarts of a job."""

    restarts: int
    """Restarts in total."""
    stalled: int
    """Consecutive restarts without a newer checkpoint."""


def main(argv: list[str] | None = None, *, prog: str = "requeue.py") -> int:
    """Run the subcommand in `argv`, `begin` or `end`; return the exit status."""
    args = parse_args(argv, prog)
    limits = Limits(args.max_restarts, args.max_stalled)
    try:
        if args.moment == "begin":
            status, message = begin(args.run, args.job, limits)
        else:
            status, message = end(args.run, args.job, args.status, limits)
    except (RunFileError, OSError) as error:
        status, message = FAILED, str(error)
    print(_printable(message), file=sys.stderr if status == FAILED else sys.stdout, flush=True)
    return status


def parse_args(argv: list[str] | None, prog: str) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Decide whether a SLURM job that trained should be requeued."
    )
    moments = parser.add_subparsers(dest="moment", required=True)
    before = moments.add_parser("begin", help="before training; exit status 1: do not train")
    after = moments.add_parser(
        "end", help="after training; exit status 0: done, 75: restart, 1: failed"
    )
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
            help="restarts of a job, whoever requeues it (%(default)s)",
        )
        moment.add_argument(
            "--max-stalled",
            type=_count,
            default=3,
            metavar="N",
            help="restarts in a row without a newer checkpoint (%(default)s)",
        )
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 0")
    return int(text)


def _printable(text: str) -> str:
    """Replace control characters, except line breaks, so that a terminal does not act on them."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def begin(run: Path, job: str, limits: Limits) -> tuple[int, str]:
    """Count a start and remove the ended.json of an earlier one.

    Returns:
        Exit status and message.

    Raises:
        RunFileError: a file of the run is damaged.
        OSError: the run directory cannot be read or written.
    """
    if not run.is_dir():
        raise RunFileError(f"there is no run directory {run}; create it before the job starts")
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
    """Decide what follows from the ended.json that the trainer wrote.

    Args:
        run: the run directory.
        job: the job id.
        status: exit status of the job step that trained.
        limits: limits on restarts.

    Returns:
        Exit status and message.

    Raises:
        RunFileError: a file of the run is damaged.
        OSError: the run directory cannot be read.
    """
    ended = _read_ended(run)
    if ended is None:
        return FAILED, (
            f"training ended with status {status} and wrote no {run / ENDED}: a process was killed,"
            " or could not start; see the nodes' logs"
        )
    reason = f"{ended['reason']}: {ended.get('detail') or 'no detail'}"
    where = f"iteration {ended.get('iteration')} of {ended.get('train_iters')}"
    if ended["requeue"]:
        # `status` is not 0 after a signal even if the checkpoint was saved, so it is ignored.
        refusal = _refusal(next_state(_read_state(run), job, _read_saved(run)), limits)
        if refusal is not None:
            return FAILED, f"stopped at {where} ({reason}); {refusal}"
        return REQUEUE, f"stopped at {where} ({reason}); to be requeued"
    if ended["reason"] == "error":
        return FAILED, f"failed: {ended.get('detail') or 'no detail'}"
    if status != 0:
        return FAILED, (
            f"the trainer ended at {where} ({reason}), but the training step with status {status};"
            " see the nodes' logs"
        )
    return DONE, f"ended at {where} ({reason})"


def next_state(before: State | None, job: str, saved: int) -> State:
    """Compute the state after one more start of `job`.

    Args:
        before: state at the last start in this run directory, if there was one.
        job: id of the job that starts; a new id resets the counts.
        saved: iteration of the newest checkpoint now.
    """
    if before is None or before.job != job:
        return State(job=job, restarts=0, stalled=0, saved=saved)
    stalled = 0 if saved > before.saved else before.stalled + 1
    return State(job=job, restarts=before.restarts + 1, stalled=stalled, saved=saved)


def _refusal(state: State, limits: Limits) -> str | None:
    """Return why `state` exceeds the limits, None if it does not."""
    if state.restarts > limits.restarts:
        return (
            f"job {state.job} was restarted {state.restarts - 1} times, which is the limit"
            f" (--max-restarts {limits.restarts}); submit it again to continue"
        )
    if state.stalled > limits.stalled:
        return (
            f"{state.stalled} restarts of job {state.job} in a row have saved nothing newer than"
            f" iteration {state.saved} (--max-stalled {limits.stalled}), so another would not"
            " either; see the nodes' logs, then submit it again"
        )
    return None


def _read_ended(run: Path) -> dict[str, Any] | None:
    found = _read_json(run / ENDED)
    if found is None:
        return None
    if not isinstance(found.get("reason"), str) or not isinstance(found.get("requeue"), bool):
        raise RunFileError(f"{run / ENDED} lacks a reason and whether to requeue: {found}")
    return found


def _read_saved(run: Path) -> int:
    path = run / TRACKER
    if not path.exists():
        return 0
    text = _read(path).strip()
    if not _NUMBER.fullmatch(text):
        raise RunFileError(f"{path} holds {text[:40]!r}; it must be the newest checkpoint's number")
    return int(text)


def _read_state(run: Path) -> State | None:
    found = _read_json(run / STATE)
    if found is None:
        return None
    counts = [found.get(name) for name in _COUNTS]
    are_counts = all(type(count) is int and count >= 0 for count in counts)
    if not isinstance(found.get("job"), str) or not are_counts:
        raise RunFileError(
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
        raise RunFileError(f"{path} is not JSON: {error}; remove it") from error
    if not isinstance(found, dict):
        raise RunFileError(f"{path} holds {found!r}, not an object; remove it")
    return found


def _read(path: Path) -> str:
    """Read a regular file; reading a pipe, for example, could block the job."""
    if not path.is_file():
        raise RunFileError(f"{path} is not a regular file; remove it")
    return path.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main())
