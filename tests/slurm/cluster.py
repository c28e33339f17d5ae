"""Runs a SLURM cluster of two virtual nodes on this machine for tests."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.paths import REPO

HERE = Path(__file__).parent
NODES = 2
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


def unmet_requirement() -> str | None:
    """Return why no cluster can run here, None if one can."""
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in programs if shutil.which(name, path=path) is None]
    if missing:
        return (
            f"{', '.join(missing)} not installed: apt-get install --no-install-recommends"
            " slurmctld slurmd slurm-client munge"
        )
    if os.geteuid() != 0:
        return "the daemons need root"
    allowed = subprocess.run(
        ["unshare", "--uts", "--mount", "true"], capture_output=True, check=False, timeout=10
    )
    return None if allowed.returncode == 0 else "unshare needs CAP_SYS_ADMIN"


def free_ports(count: int) -> int:
    """Return the first of `count` consecutive free ports."""
    # Concurrent test processes start their search at different ports.
    offset = os.getpid() * 10 % 8000
    for first in (21000 + (offset + step) % 8000 for step in range(0, 8000, 10)):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for index, each in enumerate(sockets):
                each.bind(("", first + index))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise RuntimeError("no free ports")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Controls a running cluster.

    Args:
        directory: files of the cluster.
        work: directory where jobs are submitted and write their logs.
    """

    directory: Path
    work: Path
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def start(cls, directory: Path, work: Path) -> "Cluster":
        """Start a cluster."""
        work.mkdir()
        subprocess.run(
            [str(HERE / "slurm_up.sh"), str(directory), str(NODES), str(free_ports(NODES + 1))],
            check=True,
            timeout=60,
        )
        # Jobs must not inherit variables of a surrounding SLURM job or torchrun.
        own = {
            name: value
            for name, value in os.environ.items()
            if not re.match("SLURM|SBATCH|RANK$|WORLD_SIZE$|MASTER_|PYTEST", name)
        }
        own |= {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "REPO": str(REPO),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }
        return cls(directory=directory, work=work, environment=own)

    def stop(self) -> None:
        """Stop the cluster."""
        subprocess.run([str(HERE / "slurm_down.sh"), str(self.directory)], check=False, timeout=60)

    def call(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a SLURM command in the work directory."""
        return subprocess.run(
            command,
            cwd=self.work,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def submit(self, *arguments: str | Path, **variables: str) -> str:
        """Submit a job; return its id."""
        done = self.call("sbatch", "--parsable", *map(str, arguments), **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return the fields that scontrol shows of a job."""
        done = self.call("scontrol", "show", "job", "--oneliner", number)
        assert done.returncode == 0, done.stderr
        return dict(re.findall(r"(\w+)=(\S*)", done.stdout))

    def state(self, number: str) -> str:
        """Return state and exit status of a job, such as `COMPLETED 0:0`."""
        job = self.job(number)
        return f"{job['JobState']} {job['ExitCode']}"

    def wait(self, number: str, timeout: float = 240) -> str:
        """Wait until a job has ended; return its final state and exit status."""

        def ended() -> bool:
            return self.job(number)["JobState"] in ENDED

        wait_until(ended, timeout, f"job {number} to end", lambda: self.log(number))
        return self.state(number)

    def log(self, number: str) -> str:
        """Read the output of a job's batch script."""
        path = Path(self.job(number)["StdOut"])
        return path.read_text() if path.exists() else f"{path} does not exist"


def wait_until(
    condition: Callable[[], bool],
    timeout: float,
    what: str,
    explain: Callable[[], str] = lambda: "",
) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:g} s for {what}\n{explain()}"
        time.sleep(0.2)
