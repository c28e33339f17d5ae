"""Notes what was submitted to SLURM for a corpus, so that no task of it is queued twice.

A submission has a name of its own, which its jobs carry. What they are to run belongs to that name,
and they run only while it is the latest: a job that a killed command left behind does nothing.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.io.bounded_read import read_small
from moe_app.filter.work_folder import WorkFolder
from moe_app.slurm.jobs import SlurmError, has_ended

_MOST_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Says what one command submitted."""

    name: str
    jobs: dict[str, str] = field(default_factory=dict)
    """The job of each stage, in order."""

    def with_job(self, stage: str, job: str) -> "Submission":
        """Return this submission with one more job."""
        return replace(self, jobs={**self.jobs, stage: job})


def begin_submission(folder: WorkFolder) -> Submission:
    """Note a new submission before its first job, and return it; jobs of others end at once."""
    submission = Submission(name=secrets.token_hex(8))
    folder.work.mkdir(parents=True, exist_ok=True)
    _write(folder, submission)
    return submission


def add_job(folder: WorkFolder, submission: Submission, stage: str, job: str) -> Submission:
    """Note a job of the latest submission, and return it with that job.

    Raises:
        DataError: Another command has begun a submission meanwhile.
    """
    if read_submission(folder).name != submission.name:
        raise DataError(
            f"another command submits the stages of {folder.output}, too; one at a time may; job"
            f" {job} of this one ends without a result: see that the other one is done, and start"
            " again if it is not"
        )
    longer = submission.with_job(stage, job)
    _write(folder, longer)
    return longer


def read_submission(folder: WorkFolder) -> Submission:
    """Return the latest submission; one without name and jobs where there was none.

    Raises:
        DataError: The note of it is damaged.
    """
    path = folder.submission
    try:
        value: Any = json.loads(read_small(path, most_bytes=_MOST_BYTES))
        name, jobs = value["name"], value["jobs"]
        if not isinstance(name, str) or not all(isinstance(each, str) for each in jobs.values()):
            raise ValueError("it holds other values than texts")
    except (FileNotFoundError, NotADirectoryError):
        return Submission(name="")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is not as this command writes it ({error}); see with squeue that no job of"
            " this corpus is queued, and remove the file"
        ) from error
    return Submission(name=name, jobs=jobs)


def refuse_queued(folder: WorkFolder) -> None:
    """Check that no job is queued or runs for a corpus: it and this command would do the same work.

    Raises:
        ConfigError: There is one, or SLURM cannot tell.
    """
    jobs = read_submission(folder).jobs
    if not jobs:
        return
    try:
        queued = {stage: job for stage, job in jobs.items() if not has_ended(job)}
    except SlurmError as error:
        raise ConfigError(
            f"stages of {folder.output} were submitted to SLURM as jobs {', '.join(jobs.values())},"
            f" and whether these have ended is not known: {error}; start again where SLURM answers,"
            f" or remove {folder.submission} if none of them is queued or running"
        ) from error
    if queued:
        named = ", ".join(f"{stage} (job {job})" for stage, job in queued.items())
        raise ConfigError(
            f"--output {folder.output}: {named} still to come in SLURM; nothing is done twice; wait"
            f" until they end, or cancel them (scancel {' '.join(queued.values())}) and start again"
        )


def ranks_path(folder: WorkFolder, stage: str, submission: str) -> Path:
    """Return the list of the tasks of a stage that one submission is to run."""
    return folder.stage(stage) / f"ranks-{submission}.json"


def write_ranks(
    folder: WorkFolder, stage: str, submission: Submission, ranks: Sequence[int]
) -> None:
    """Write the tasks of a stage that a submission is to run."""
    path = ranks_path(folder, stage, submission.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(list(ranks)) + "\n")


def read_ranks(folder: WorkFolder, stage: str, submission: str) -> list[int]:
    """Return the tasks of a stage that a submission is to run.

    Raises:
        DataError: It is not the latest, or the list is missing or damaged.
    """
    latest = read_submission(folder)
    if latest.name != submission:
        raise DataError(
            f"this job is of submission {submission}, but the latest of {folder.output} is"
            f" {latest.name or 'not known'}: its jobs do this work; this one does nothing"
        )
    path = ranks_path(folder, stage, submission)
    try:
        ranks = json.loads(read_small(path, most_bytes=_MOST_BYTES))
        if not isinstance(ranks, list) or not all(type(each) is int for each in ranks):
            raise ValueError("it is no list of whole numbers")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be used ({error}); submit the stages again") from error
    return ranks


def _write(folder: WorkFolder, submission: Submission) -> None:
    value = {"name": submission.name, "jobs": submission.jobs}
    write_text(folder.submission, json.dumps(value, indent=1) + "\n")
