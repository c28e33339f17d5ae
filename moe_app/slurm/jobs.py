"""Asks SLURM: writes a batch script, submits it, follows the job to its end."""

import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.trainer.errors import ConfigError, UserError

ENDED_STATES = frozenset(
    (
        *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "PREEMPTED"),
        *("NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"),
    )
)
"""States that a job does not leave by itself; a requeued job is never in one."""
PATIENCE_S = 300.0
"""How long a controller may not answer while a job is followed."""


class SlurmError(UserError):
    """SLURM is not there, or refused what it was asked."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What is asked of SLURM for a run."""

    name: str
    """Of the job."""
    run: Path
    """Run directory, absolute."""
    recipe: Path
    """Resolved recipe, absolute."""
    repository: Path
    """Where examples/slurm is, absolute."""
    nodes: int
    """Number of nodes."""
    ranks_per_node: int
    """Processes on each."""
    options: tuple[str, ...]
    """Further options of sbatch, each a word."""
    variables: dict[str, str]
    """Of examples/slurm/pretrain.sbatch."""
    comment: str
    """One line that says what it is."""

    def script(self) -> str:
        """The batch script.

        Raises:
            ConfigError: something in it cannot be a line of a script.
        """
        directives = (
            f"--job-name={self.name}",
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            f"--output={self.run / 'logs'}/%x-%j.out",
            "--open-mode=append",
            "--requeue",
            "--signal=B:USR1@300",
            *self.options,
        )
        variables = {
            "REPO": str(self.repository),
            "RANKS_PER_NODE": str(self.ranks_per_node),
            **self.variables,
        }
        pretrain = self.repository / "examples" / "slurm" / "pretrain.sbatch"
        command = shlex.join(["exec", "bash", str(pretrain), str(self.recipe), str(self.run)])
        lines = [
            "#!/usr/bin/env bash",
            f"# {self.comment}",
            *(f"#SBATCH {_directive(each)}" for each in directives),
            "set -euo pipefail",
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            command,
        ]
        broken = [line for line in lines if not line.isprintable()]
        if broken:
            raise ConfigError(
                f"{broken[0]!r} cannot be a line of a batch script; use names and options without"
                " line breaks"
            )
        return "\n".join(lines) + "\n"


def _directive(option: str) -> str:
    """An option as #SBATCH reads it: sbatch knows double quotes, and no shell does."""
    if not re.search(r"""[\s"'#\\]""", option):
        return option
    if '"' in option or "\\" in option:
        raise ConfigError(f"{option!r} has a quote or backslash, which #SBATCH cannot hold")
    return f'"{option}"'


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as scontrol shows it."""

    number: str
    """Its id."""
    state: str
    """RUNNING, PENDING, COMPLETED..."""
    reason: str
    """Why it waits, or failed."""
    restarts: int
    """How often it was requeued."""
    status: int
    """Its exit status, once it has one; of a job that a signal ended, 128 + its number."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ENDED_STATES

    @property
    def exit_status(self) -> int:
        """0 for a job that was completed, and only for it."""
        return 0 if self.state == "COMPLETED" else self.status or 1

    def __str__(self) -> str:
        """State, and what else matters."""
        waits = self.state == "PENDING" and self.reason not in ("None", "")
        restarts = f", restart {self.restarts}" if self.restarts else ""
        return f"{self.state}{f' ({self.reason})' if waits else ''}{restarts}"


def submit(script: Path) -> str:
    """Hand a batch script to SLURM; returns the job's id.

    Raises:
        SlurmError: sbatch is not there, or refuses.
    """
    return _ask("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def look_up(number: str) -> Job | None:
    """What SLURM knows of a job; None when it has forgotten it.

    Raises:
        SlurmError: SLURM does not answer.
    """
    try:
        shown = _ask("scontrol", "show", "job", "--oneliner", number)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return parse_job(shown)


def parse_job(shown: str) -> Job:
    """Read the line that `scontrol show job --oneliner` prints.

    Raises:
        SlurmError: it is no such line.
    """
    found = dict(re.findall(r"(\w+)=(\S*)", shown))
    try:
        code, signal_number = (int(part) for part in found["ExitCode"].split(":"))
        return Job(
            number=found["JobId"],
            state=found["JobState"],
            reason=found["Reason"],
            restarts=int(found["Restarts"]),
            status=128 + signal_number if signal_number else code,
        )
    except (KeyError, ValueError) as error:
        raise SlurmError(f"scontrol printed something else than a job: {shown[:200]!r}") from error


def watch(number: str, *, poll_s: float) -> Iterator[Job]:
    """A job again and again, until it has ended; that is the last one.

    Raises:
        SlurmError: SLURM has forgotten it, or has not answered for long.
    """
    silent_since: float | None = None
    while True:
        try:
            job = look_up(number)
        except SlurmError:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > PATIENCE_S:
                raise
            time.sleep(poll_s)
            continue
        silent_since = None
        if job is None:
            raise SlurmError(
                f"SLURM has no job {number} any more, so its exit status is not known; see the logs"
                f" and ended.json in the run directory, or `sacct -j {number}`"
            )
        yield job
        if job.has_ended:
            return
        time.sleep(poll_s)


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except FileNotFoundError as error:
        raise SlurmError(
            f"there is no {command[0]} on this machine; submit where SLURM's commands are, or use"
            " --dry-run"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} has not answered within {error.timeout:g} s") from error
    if done.returncode != 0:
        raise SlurmError(f"{shlex.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
