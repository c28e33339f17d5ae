"""Decides what of this machine a program sees, and how many processes it may have.

Root's programs run as an unprivileged user of their own, because the system exempts root from the
limit on processes; those of another user stay that user's, in a user namespace.
"""

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WRITABLE = "/tmp"
ENVIRONMENT = {"HOME": WRITABLE, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
"""All that a program finds in its environment."""

_FIRST_UID, _UIDS_OF_PROCESS, _NUM_PROCESSES = 0x70000000, 64, 1 << 20
"""Users that no system gives away, so many for each process that runs programs."""
_FEW_UIDS = range(65520, 65534)
"""The same where a container has no others."""
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")
_COUNTS_BY_NAMESPACE = (5, 14)
"""Since this kernel the limit on processes counts those in a user namespace, not all of a user."""


@dataclass(frozen=True, kw_only=True)
class ProgramLimits:
    """Holds what one program may use."""

    seconds: float = 60.0
    """By the clock."""
    cpu_seconds: int = 10
    """Of each process."""
    memory_bytes: int = 1 << 30
    """Of address space of each process."""
    processes: int = 16
    """Processes and threads together."""
    output_bytes: int = 1 << 16
    """Written to standard output and error."""
    disk_bytes: int = 1 << 26
    """Of the directory that it may write to."""
    open_files: int = 64
    """At a time, in each process."""


def find_python(executable: str, base_prefix: str) -> tuple[str, str]:
    """Return the Python that runs programs, without this one's packages, and its directory."""
    return os.path.realpath(executable), os.path.realpath(base_prefix)


def program_users() -> range | None:
    """Return the users that programs run as, each at a time; None is this process's user.

    Processes of one user count together, so that each process that runs programs has users of its
    own, and each of its programs, too.
    """
    if os.getuid() != 0:
        return None
    own = _FIRST_UID + os.getpid() % _NUM_PROCESSES * _UIDS_OF_PROCESS
    for users in (range(own, own + _UIDS_OF_PROCESS), _FEW_UIDS):
        if _is_mapped(users):
            return users
    return None


def _is_mapped(users: range) -> bool:
    """Return whether this user namespace has some users."""
    lines = Path("/proc/self/uid_map").read_text("ascii").splitlines()
    ranges = [[int(field) for field in line.split()] for line in lines]
    return any(first <= users[0] and users[-1] < first + count for first, _, count in ranges)


def bubblewrap_command(
    bwrap: str, base_prefix: str, *, filter_fd: int, has_own_user: bool, limits: ProgramLimits
) -> list[str]:
    """Return the command that starts what follows it in a sandbox.

    Args:
        bwrap: the program.
        base_prefix: directory of Python, which is shown as the system's is.
        filter_fd: has the filter of system calls.
        has_own_user: whether the program is to become another user, else a user namespace is made.
        limits: of the program.
    """
    user = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    size = str(limits.disk_bytes)
    return [
        bwrap,
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
        "--unshare-cgroup-try",
        *(["--cap-drop", "ALL", *user] if has_own_user else ["--unshare-user"]),
        *("--die-with-parent", "--new-session", "--hostname", "sandbox"),
        *_system_mounts(base_prefix),
        *("--proc", "/proc", "--dev", "/dev"),
        *("--perms", "1777", "--size", size, "--tmpfs", "/dev/shm"),
        *("--remount-ro", "/dev"),
        *("--perms", "1777", "--size", size, "--tmpfs", WRITABLE),
        *("--chdir", WRITABLE, "--remount-ro", "/"),
        *("--seccomp", str(filter_fd), "--"),
    ]


def _system_mounts(base_prefix: str) -> Iterator[str]:
    for path in _SYSTEM:
        if os.path.islink(path):
            yield from ("--symlink", os.readlink(path), path)
        elif os.path.isdir(path):
            yield from ("--ro-bind", path, path)
    yield from ("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")
    if not base_prefix.startswith("/usr/") and base_prefix != "/usr":
        for folder in reversed(Path(base_prefix).parents[:-1]):
            # It would be closed to other users, as bubblewrap makes it.
            yield from ("--perms", "0755", "--dir", str(folder))
        yield from ("--ro-bind", base_prefix, base_prefix)


def resource_limits(
    limits: ProgramLimits, *, uid: int | None, has_namespace: bool
) -> dict[str, int]:
    """Return the limits by the names that the module `resource` has for them.

    Args:
        limits: of the program.
        uid: the user that it runs as; None is this one.
        has_namespace: whether it has a user namespace of its own.
    """
    others = 0
    if not (has_namespace and _kernel_version() >= _COUNTS_BY_NAMESPACE):
        others = _count_tasks(os.getuid() if uid is None else uid)
    return {
        "AS": limits.memory_bytes,
        "CPU": limits.cpu_seconds,
        "FSIZE": limits.disk_bytes,
        "NOFILE": limits.open_files,
        "NPROC": limits.processes + others,
    }


def _kernel_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])


def _count_tasks(uid: int) -> int:
    """Return how many processes and threads a user has."""
    total = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            if folder.stat().st_uid == uid:
                total += len(os.listdir(folder / "task"))
        except OSError:  # it has ended
            continue
    return total
