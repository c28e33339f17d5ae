"""Formats batch scripts, submits them to SLURM and follows their jobs."""

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
"""Final states of a job; a requeued job is never in one."""
UNREACHABLE_S = 300.0
"""How long the controller may be unreachable while a job is followed."""


class SlurmError(UserError):
    """Reports that SLURM is unavailable or has rejected a command."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """Describes the job to submit for a run."""

    name: str
    """Job name."""
    run: Path
    """Run directory, absolute path."""
    recipe: Path
    """Resolved recipe, absolute path."""
    repository: Path
    """Checkout with examples/slurm, absolute path."""
    nodes: int
    """Number of nodes."""
    ranks_per_node: int
    """Ranks on each node."""
    options: tuple[str, ...]
    """Further sbatch options, one word each."""
    variables: dict[str, str]
    """Environment variables for examples/slurm/pretrain.sbatch."""
    comment: str
    """One line that describes the job."""

    def script(self) -> str:
        """Format the batch script.

        Raises:
            ConfigError: a name or option has a line break or a control character.
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
    """Quote an option for an #SBATCH line, where sbatch understands double quotes only."""
    if not re.search(r"""[\s"'#\\]""", option):
        return option
    if '"' in option or "\\" in option:
        raise ConfigError(f"{option!r} has a quote or backslash, which #SBATCH cannot hold")
    return f'"{option}"'


@dataclass(frozen=True, kw_only=True)
class Job:
    """Holds what scontrol shows of a job."""

    job_id: str
    state: str
    """RUNNING, PENDING, COMPLETED..."""
    reason: str
    """Why it is pending, or has failed."""
    restarts: int
    """Number of times it was requeued."""
    status: int
    """Exit status once it has one; 128 + the signal's number for a job that a signal ended."""

    @property
    def has_ended(self) -> bool:
        """Return whether the job is in a final state."""
        return self.state in ENDED_STATES

    @property
    def exit_status(self) -> int:
        """Return 0 for a completed job, and only for it."""
        return 0 if self.state == "COMPLETED" else self.status or 1

    def __str__(self) -> str:
        """Format state, the reason while pending, and restarts."""
        waits = self.state == "PENDING" and self.reason not in ("None", "")
        restarts = f", restart {self.restarts}" if self.restarts else ""
        return f"{self.state}{f' ({self.reason})' if waits else ''}{restarts}"


def submit(script: Path) -> str:
    """Submit a batch script; return the job id.

    Raises:
        SlurmError: sbatch is not installed, or rejects the script.
    """
    return _slurm("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def query_job(job_id: str) -> Job | None:
    """Return the state of a job; None once SLURM has purged it.

    Raises:
        SlurmError: SLURM does not respond.
    """
    shown = _show(job_id)
    return None if shown is None else parse_job(shown)


def has_ended(job_id: str) -> bool:
    """Return whether a job has ended, all elements of an array included, or SLURM has purged it.

    Raises:
        SlurmError: SLURM does not respond.
    """
    lines = (_show(job_id) or "").splitlines()
    return all(parse_job(line).has_ended for line in lines if line.strip())


def _show(job_id: str) -> str | None:
    """Return a line for each element of a job; None once SLURM has purged it."""
    try:
        return _slurm("scontrol", "show", "job", "--oneliner", job_id)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def parse_job(shown: str) -> Job:
    """Parse the line that `scontrol show job --oneliner` prints.

    Raises:
        SlurmError: the line is not in this format.
    """
    found = dict(re.findall(r"(\w+)=(\S*)", shown))
    try:
        code, signal_number = (int(part) for part in found["ExitCode"].split(":"))
        return Job(
            job_id=found["JobId"],
            state=found["JobState"],
            reason=found["Reason"],
            restarts=int(found["Restarts"]),
            status=128 + signal_number if signal_number else code,
        )
    except (KeyError, ValueError) as error:
        raise SlurmError(f"scontrol did not print a job: {shown[:200]!r}") from error


def poll_job(job_id: str, *, poll_s: float) -> Iterator[Job]:
    """Yield the state of a job every `poll_s` seconds, last the final one.

    Raises:
        SlurmError: SLURM has purged the job, or has not responded for `UNREACHABLE_S`.
    """
    silent_since: float | None = None
    while True:
        try:
            job = query_job(job_id)
        except SlurmError:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > UNREACHABLE_S:
                raise
            time.sleep(poll_s)
            continue
        silent_since = None
        if job is None:
            raise SlurmError(
                f"SLURM has no job {job_id} any more, so its exit status is unknown; see the logs"
                f" and ended.json in the run directory, or `sacct -j {job_id}`"
            )
        yield job
        if job.has_ended:
            return
        time.sleep(poll_s)


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except FileNotFoundError as error:
        raise SlurmError(
            f"there is no {command[0]} on this machine; submit where SLURM is installed, or use"
            " --dry-run"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} has not responded within {error.timeout:g} s") from error
    if done.returncode != 0:
        raise SlurmError(f"{shlex.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
