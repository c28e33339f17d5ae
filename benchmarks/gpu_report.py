"""Measures this project on one GPU beside its peers, and writes docs/gpu.md.

    make gpu-report                          # the same, in the project's environment
    python -m benchmarks.gpu_report --parts layer,step --limit 900
    python -m benchmarks.gpu_report --device cpu        # a trial at tiny sizes, without a GPU

Each part has its own time limit and its own log; one that fails ends no other. Its results stay as
JSON in the folder, and the page is made of all that the folder holds, so that a part can be
measured again by itself. The status is 0 if each part that was asked for ran to its end.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_page import page
from benchmarks.gpu_parts import DEFAULT, Part, Setup, command_line, parts

REPO = Path(__file__).resolve().parents[1]
LIMIT_S = 2400.0
LEAST_S = 15.0
"""A part is not begun with less left."""
_SHOWN_LINES = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that `argv` names; return the exit status."""
    args = _parse(argv)
    folder = args.folder or REPO / "gpu-results" / ("" if args.device == "cuda" else "trial")
    folder = folder.resolve()
    machine = read_machine()
    if args.device == "cuda" and machine["gpu"] is None:
        print(
            f"gpu_report: torch {machine['torch']} sees no GPU here. Run it on a machine with one"
            " and a CUDA build of torch, or try it at a tiny size: --device cpu",
            file=sys.stderr,
        )
        return 2
    setup = Setup(device=args.device, folder=folder, gpu_bytes=machine["gpu_memory_bytes"])
    every = parts(setup)
    unknown = [name for name in args.parts or () if name not in every]
    if unknown:
        print(f"gpu_report: no part {unknown[0]!r}; use {', '.join(every)}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    chosen = args.parts or DEFAULT[args.device]
    deadline = time.monotonic() + args.limit
    problems = 0
    for name in every:
        if name in chosen:
            problems += bool(run_part(name, every[name], setup, machine, deadline)["problems"])
    output = args.output or (REPO / "docs/gpu.md" if not setup.is_trial else folder / "gpu.md")
    output.write_text(make_page(setup), encoding="utf-8")
    say(f"wrote {output}; logs and results are in {folder}")
    return int(problems > 0)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), metavar="PART,...", help="default: all"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="of all (%(default)g)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: a trial at tiny sizes (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="the page; default: docs/gpu.md, of a trial FOLDER/gpu.md",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="results; default: gpu-results"
    )
    return parser.parse_args(argv)


def read_machine() -> dict[str, Any]:
    """Describe the machine from another process, so that this one holds nothing on the GPU.

    Raises:
        subprocess.CalledProcessError: torch cannot be imported; its error was printed.
    """
    command = command_line(["benchmarks.machine"])
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, check=True)
    machine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return machine


def run_part(
    name: str, part: Part, setup: Setup, machine: dict[str, Any], deadline: float
) -> dict[str, Any]:
    """Run a part's commands, and write what it left as FOLDER/part-NAME.json; return it."""
    started = time.monotonic()
    end = min(started + part.limit_s, deadline)
    problems, found = [], {}
    if part.unfit is not None:
        problems.append(part.unfit)
    log = setup.folder / f"{name}.log"
    log.write_text("", encoding="utf-8")
    for file, command in part.commands.items() if part.unfit is None else ():
        path = setup.folder / file
        path.unlink(missing_ok=True)
        problem = run(command_line(command), log, limit_s=end - time.monotonic())
        if problem is not None:
            problems.append(problem)
            say(f"{name}: {problem}; the end of {log}:\n{tail(log)}")
        try:
            found[file] = part.read(path)
        except (
            OSError,
            ValueError,
            SyntaxError,
        ) as error:  # absent, or broken off
            problems.append(f"no {file}: {type(error).__name__}")
    seconds = time.monotonic() - started
    record = {
        "title": part.title,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "seconds": seconds,
        "commands": [_on_page(command, setup) for command in part.commands.values()],
        "problems": problems,
        "machine": machine,
        "found": found,
    }
    _record_path(setup, name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    say(f"{name}: {'; '.join(problems) or 'ran'}, {seconds:.0f} s")
    return record


def run(command: list[str], log: Path, *, limit_s: float) -> str | None:
    """Run a command, and end all its processes with it; return what went wrong, in a line.

    Args:
        command: to run in the repository's root.
        log: takes its output.
        limit_s: how long it may take.
    """
    if limit_s < LEAST_S:
        return "no time was left"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=REPO, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"ended after {limit_s:.0f} s, its limit"
        finally:
            end_group(process)
    return None if status == 0 else f"ended with status {status}"


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of a command, which leads a group of processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all have ended
    process.wait()


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:])


def make_page(setup: Setup) -> str:
    """Make the page of all records in the folder."""
    records, missing = {}, {}
    for name, part in parts(setup).items():
        path = _record_path(setup, name)
        if path.exists():
            records[name] = json.loads(path.read_text(encoding="utf-8"))
        else:
            missing[part.title] = "not run"
    return page(records, missing=missing, is_trial=setup.is_trial)


def _record_path(setup: Setup, name: str) -> Path:
    return setup.folder / f"part-{name}.json"


def _on_page(command: list[str], setup: Setup) -> list[str]:
    """Return a command without this machine's paths."""
    return [each.replace(str(setup.folder), "gpu-results") for each in command]


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
