"""Let hostile programs loose in the sandbox; each would leave a trace, or not end, without it."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron.trainer.errors import ConfigError
from moe_app.evaluate.execution import prison
from moe_app.evaluate.execution import sandbox as sandbox_module
from moe_app.evaluate.execution.prison import ProgramLimits
from moe_app.evaluate.execution.sandbox import Outcome, Sandbox
from moe_app.evaluate.execution.system_calls import DENIED, filter_program

LIMITS = ProgramLimits(seconds=600, cpu_seconds=60, processes=12, disk_bytes=1 << 22)
NOBODY = 0x70FFFFFF
QUICK = ProgramLimits(seconds=600, cpu_seconds=1, processes=3)


def has_sandbox() -> bool:
    """Return whether this machine has bubblewrap and lets it make namespaces."""
    bwrap = shutil.which("bwrap")
    if bwrap is None or platform.machine() not in DENIED:
        return False
    command = [bwrap, "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "--proc", "/proc"]
    return subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0


needs_sandbox = pytest.mark.skipif(not has_sandbox(), reason="needs bubblewrap and namespaces")


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox("bubblewrap", limits=LIMITS, workers=2)


def outcome_of(sandbox: Sandbox, program: str) -> tuple[str, str]:
    found = sandbox.run(program)
    return found.ending, found.error.split(":")[0]


FORK_BOMB = """
import os
while True:
    os.fork()
"""
STUBBORN_BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
STUBBORN_LOOP = """
import signal
for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True:
    pass
"""
MANY_FILES = """
for number in range(100):
    with open(f"/tmp/{number}", "wb") as file:
        file.write(bytes(1 << 20))
"""
SHARED_MEMORY = """
import ctypes
system = ctypes.CDLL(None, use_errno=True)
calls = [
    system.shmget(0, 1 << 20, 0o1600),
    system.memfd_create(b"a", 0),
    system.unshare(0x10000000),
    system.mount(b"a", b"/tmp", b"tmpfs", 0, None),
]
assert calls == [-1] * 4, calls
"""


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "ending", "error"),
    [
        ("assert 1 + 1 == 2", "passed", ""),
        ("assert 1 + 1 == 3, 'no'", "failed", "AssertionError"),
        ("def f(:", "failed", "SyntaxError"),
        # What ends the process before the tests at its end has not passed them.
        ("raise SystemExit(0)", "failed", "SystemExit"),
        ("import os\nos._exit(0)", "ended", "the process ended itself with status 0"),
        ("import os\nos.kill(os.getpid(), 9)", "ended", "the process was ended by SIGKILL"),
        # Processes.
        (FORK_BOMB, "failed", "BlockingIOError"),
        ("import os\nif os.fork(): os.wait()\nelse: 1 / 0", "passed", ""),
        # Memory and disk.
        ("bytearray(1 << 34)", "failed", "MemoryError"),
        (SHARED_MEMORY, "passed", ""),
        ("open('/tmp/a', 'wb').write(bytes(1 << 23))", "failed", "OSError"),
        (MANY_FILES, "failed", "OSError"),
        (MANY_FILES.replace("/tmp/", "/dev/shm/"), "failed", "OSError"),
        ("[open('/dev/null') for _ in range(1000)]", "failed", "OSError"),
        # Output.
        ("while True: print('a' * 1000)", "output", "it wrote too much"),
        ("import os\nwhile True: os.write(2, b'a' * 1000)", "output", "it wrote too much"),
        # Network.
        (
            "import socket\nsocket.create_connection(('127.0.0.1', 22))",
            "failed",
            "ConnectionRefusedError",
        ),
        ("import socket\nsocket.create_connection(('192.0.2.1', 53))", "failed", "OSError"),
        # Writes outside.
        ("open('/usr/written', 'w')", "failed", "OSError"),
        ("open('/written', 'w')", "failed", "OSError"),
        ("open('/dev/written', 'w')", "failed", "OSError"),
        (
            "try:\n    open('/proc/sys/kernel/core_pattern', 'w')\nexcept OSError:\n    1 / 0",
            "failed",
            "ZeroDivisionError",
        ),
        ("import os\nos.symlink('/usr', '/tmp/a')\nopen('/tmp/a/b', 'w')", "failed", "OSError"),
    ],
)
def test_program_is_contained(sandbox: Sandbox, program: str, ending: str, error: str) -> None:
    assert outcome_of(sandbox, program) == (ending, error)


@needs_sandbox
def test_loop_that_ignores_signals_is_ended() -> None:
    found = Sandbox("bubblewrap", limits=QUICK, workers=1).run(STUBBORN_LOOP)
    assert (found.ending, found.error) == ("ended", "the process was ended by SIGKILL")


@needs_sandbox
@pytest.mark.parametrize(
    "program", ["import time\ntime.sleep(3600)", STUBBORN_BOMB], ids=["sleep", "bomb"]
)
def test_program_is_ended_by_the_clock(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Sandbox("bubblewrap", limits=LIMITS, workers=1)
    monkeypatch.setattr(sandbox, "_limits", ProgramLimits(seconds=0.5))
    # It returns when the last process that held the output is gone.
    assert sandbox.run(program).ending == "time"


@needs_sandbox
def test_processes_left_behind_are_ended_with_the_program(sandbox: Sandbox) -> None:
    # They hold its output open: unless they end, so would the wait for it, with its time.
    left = (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sleep', ['s', '9999'])"
    )
    assert sandbox.run(left) == Outcome(ending="passed", error="", output="")
    silent = "import os\nos.close(1)\nos.close(2)\nprint"
    assert sandbox.run(silent).passed


@needs_sandbox
def test_program_sees_nothing_of_this_machine(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "value")
    (tmp_path / "secret").write_text("value")
    home = Path.home() / ".bashrc"
    program = f"""
import os
assert "A_SECRET" not in os.environ and len(os.environ) <= 5, sorted(os.environ)
assert os.getuid() != 0
for path in {[str(tmp_path / "secret"), str(home), "/etc/passwd", "/home", "/work", "/var"]}:
    assert not os.path.exists(path), path
assert os.listdir("/tmp") == []
processes = [name for name in os.listdir("/proc") if name.isdecimal()]
assert len(processes) <= 3, processes
for name in processes:
    try:
        content = open(f"/proc/{{name}}/environ", "rb").read()
    except OSError:
        continue
    assert b"SECRET" not in content
for descriptor in os.listdir("/proc/self/fd"):
    path = os.path.realpath(f"/proc/self/fd/{{descriptor}}")
    assert not path.startswith({str(Path.cwd())!r}), path
"""
    assert sandbox.run(program) == Outcome(ending="passed", error="", output="")


@needs_sandbox
def test_what_is_written_is_thrown_away(sandbox: Sandbox) -> None:
    program = "import os\nassert os.listdir('.') == []\nopen('a', 'w').close()\nprint(os.getcwd())"
    outcomes = list(sandbox.run_all([program] * 5))
    assert outcomes == [Outcome(ending="passed", error="", output="/tmp\n")] * 5


def test_output_is_kept_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prison, "program_users", lambda: None)
    sandbox = Sandbox("limits", limits=ProgramLimits(output_bytes=5), workers=1)
    assert sandbox.run("print('abcd')").output == "abcd\n"
    found = sandbox.run("print('abcde')")
    assert (found.ending, found.output) == ("output", "abcde")


def test_limits_hold_without_a_sandbox(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prison, "program_users", lambda: None)
    sandbox = Sandbox("limits", limits=QUICK, workers=1)
    assert "WITHOUT a sandbox" in caplog.text
    assert outcome_of(sandbox, "open('a', 'w')\nassert 1 == 1") == ("passed", "")
    assert outcome_of(sandbox, "bytearray(1 << 34)") == ("failed", "MemoryError")
    assert outcome_of(sandbox, STUBBORN_LOOP)[1] == "the process was ended by SIGKILL"
    assert outcome_of(sandbox, "while True: print('a' * 1000)")[0] == "output"
    # What it leaves behind holds its output, and is ended with it.
    left = "import os\nif os.fork() == 0: os.execv('/bin/sleep', ['s', '9999'])"
    assert outcome_of(sandbox, left) == ("passed", "")


def test_missing_bubblewrap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; install it .*--unsafe-execution limits"):
        Sandbox("bubblewrap", limits=LIMITS, workers=1)


def test_forbidden_namespaces_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bwrap = tmp_path / "bwrap"
    bwrap.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n"
    )
    bwrap.chmod(0o755)
    monkeypatch.setattr(sandbox_module.shutil, "which", lambda name: str(bwrap))
    with pytest.raises(ConfigError, match=r"No permissions.*unprivileged_userns_clone.*limits"):
        Sandbox("bubblewrap", limits=LIMITS, workers=1)


def test_python_that_programs_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prison, "program_users", lambda: None)
    monkeypatch.setattr(sandbox_module, "_PROBE", "import no_such_module")
    with pytest.raises(ConfigError, match=r"ModuleNotFoundError.*let every user read"):
        Sandbox("limits", limits=LIMITS, workers=1)


def test_filter_is_refused_for_unknown_processors() -> None:
    assert len(filter_program("x86_64")) == len(filter_program("aarch64")) > 0
    with pytest.raises(ConfigError, match="s390x"):
        filter_program("s390x")


def test_processes_of_others_do_not_count_as_the_programs() -> None:
    # The limit counts all of a user, where there is no user namespace to count in.
    limits = ProgramLimits(processes=7)
    alone = prison.resource_limits(limits, uid=NOBODY, has_namespace=False)
    assert alone["NPROC"] == 7
    mine = prison.resource_limits(limits, uid=None, has_namespace=False)
    assert mine["NPROC"] > 7
