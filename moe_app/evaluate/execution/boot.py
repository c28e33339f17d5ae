"""Runs one program within limits; its text is handed to Python in the sandbox, with nothing else.

It reads a job from its standard input, takes every privilege away from itself, says that it has
begun, runs the program, and says how it ended. A program that ends the process on the way says
nothing, and has failed. Nothing but the standard library is there.
"""

import json
import os
import resource
import sys
import types
from typing import Any

MOST_ERROR_CHARACTERS = 500


def main() -> None:
    """Run the job that the standard input holds."""
    job: dict[str, Any] = json.load(sys.stdin)
    verdict = int(job["verdict"])
    _give_up(job["uid"])
    _limit_self(job["limits"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.write(verdict, b"began\n")
    own = os.getpid()
    ending = {"key": job["key"], **_run(job["program"])}
    # A process that the program forked comes here, too.
    if os.getpid() == own:
        _flush()
        os.write(verdict, json.dumps(ending).encode() + b"\n")
    # Threads and exit handlers of the program do not matter any more.
    os._exit(0)


def _give_up(uid: int | None) -> None:
    """Become an unprivileged user; the system exempts root from the limit on processes."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def _limit_self(limits: dict[str, int]) -> None:
    """Set limits that nobody but root can raise again."""
    for name, value in {**limits, "CORE": 0}.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")  # where memory runs short, the system ends this first
    except OSError:
        return


def _run(program: str) -> dict[str, Any]:
    """Run a program; return whether it ended well, and its error."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
    except BaseException as error:
        try:
            text = f"{type(error).__name__}: {error}"[:MOST_ERROR_CHARACTERS]
        except BaseException:
            text = type(error).__name__[:MOST_ERROR_CHARACTERS]
        return {"passed": False, "error": text}
    return {"passed": True, "error": ""}


def _flush() -> None:
    """Write what the program printed, if it left its output whole."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            continue


if __name__ == "__main__":
    main()
