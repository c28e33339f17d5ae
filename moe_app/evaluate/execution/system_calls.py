"""Makes the filter that takes dangerous system calls away from a program in the sandbox.

Limits of a process do not count what these calls hold or open: memory of a `tmpfs` that a program
mounts in a user namespace of its own, of System V segments and of `memfd`, and the parts of the
kernel that had most holes. The filter is a classic BPF program, as seccomp(2) describes.
"""

import errno
import platform
import struct

from megatron.trainer.errors import ConfigError

_CLONE_NEWUSER = 0x10000000
_X32 = 0x40000000
"""Bit of the numbers of a second interface of x86-64."""
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in what the kernel shows to a filter."""

_COMMON = {
    "clone3": 435,
    "fsconfig": 431,
    "fsmount": 432,
    "fsopen": 430,
    "io_uring_setup": 425,
    "memfd_secret": 447,
    "mount_setattr": 442,
    "move_mount": 429,
    "open_tree": 428,
}
DENIED: dict[str, dict[str, int]] = {
    "x86_64": {
        **_COMMON,
        "add_key": 248,
        "bpf": 321,
        "keyctl": 250,
        "memfd_create": 319,
        "mount": 165,
        "msgget": 68,
        "perf_event_open": 298,
        "pivot_root": 155,
        "ptrace": 101,
        "request_key": 249,
        "semget": 64,
        "setns": 308,
        "shmget": 29,
        "umount2": 166,
        "unshare": 272,
        "userfaultfd": 323,
    },
    "aarch64": {
        **_COMMON,
        "add_key": 217,
        "bpf": 280,
        "keyctl": 219,
        "memfd_create": 279,
        "mount": 40,
        "msgget": 186,
        "perf_event_open": 241,
        "pivot_root": 41,
        "ptrace": 117,
        "request_key": 218,
        "semget": 190,
        "setns": 268,
        "shmget": 194,
        "umount2": 39,
        "unshare": 97,
        "userfaultfd": 282,
    },
}
"""Numbers of the calls that fail, by processor."""
_CLONE = {"x86_64": 56, "aarch64": 220}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def filter_program(machine: str | None = None) -> bytes:
    """Return the filter for a processor, this machine's by default.

    Raises:
        ConfigError: its system calls are not known here.
    """
    machine = platform.machine() if machine is None else machine
    if machine not in DENIED:
        raise ConfigError(
            f"generated programs cannot be run on {machine}: the system calls that a sandbox denies"
            f" are known for {' and '.join(DENIED)}; evaluate on such a machine"
        )
    code = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, _AUDIT[machine], then=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_AT_LEAST, _X32, otherwise=1),
        _step(_RETURN, _ERRNO | errno.EPERM),
    ]
    for name, number in DENIED[machine].items():
        # Libraries that find no clone3 use clone, whose flags can be looked at.
        code += [
            _step(_EQUAL, number, otherwise=1),
            _step(_RETURN, _ERRNO | (errno.ENOSYS if name == "clone3" else errno.EPERM)),
        ]
    code += [
        _step(_EQUAL, _CLONE[machine], otherwise=3),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_ANY_BIT, _CLONE_NEWUSER, otherwise=1),
        _step(_RETURN, _ERRNO | errno.EPERM),
        _step(_RETURN, _ALLOW),
    ]
    return b"".join(code)


def _step(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    """Return an instruction; jumps skip `then` or `otherwise` instructions."""
    return struct.pack("=HBBI", code, then, otherwise, value)
