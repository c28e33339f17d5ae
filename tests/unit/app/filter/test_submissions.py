"""Check that jobs of a corpus and a repeated command never do the same work."""

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron.trainer.errors import DataError
from moe_app.filter import submissions
from moe_app.filter.filter_data import main
from moe_app.filter.pipeline import cluster_executors
from moe_app.filter.submissions import (
    add_job,
    begin_submission,
    read_submission,
    refuse_queued,
)
from moe_app.filter.work_folder import WorkFolder
from moe_app.slurm import jobs
from moe_app.slurm.jobs import SlurmError, has_ended
from tests.unit.app.filter.four_files import finished_corpus, write_four_files


class Queue:
    """Stands for SLURM: keeps what is submitted and runs its elements when told to."""

    def __init__(self) -> None:
        self.scripts: dict[str, str] = {}
        self.ended: set[str] = set()

    def submit(self, script: Path) -> str:
        job = str(101 + len(self.scripts))
        self.scripts[job] = script.read_text()
        return job

    def has_ended(self, job: str) -> bool:
        return job in self.ended

    def run(self, job: str, elements: int | None = None) -> list[int]:
        """Run the first elements of an array, all of them without a number."""
        script = self.scripts[job]
        (last,) = re.findall(r"#SBATCH --array=0-(\d+)", script)
        count = int(last) + 1 if elements is None else elements
        words = shlex.split(script.splitlines()[-1])
        arguments = words[words.index("filter") + 1 : words.index("--share")]
        return [main([*arguments, "--share", str(share)]) for share in range(count)]


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(cluster_executors, "submit", queue.submit)
    monkeypatch.setattr(submissions, "has_ended", queue.has_ended)
    return queue


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Return a command over four files, each of which repeats a text of the first."""
    folder = tmp_path / "in"
    write_four_files(folder)
    return ["--input", str(folder), "--filter", "minhash:buckets=2,ngram=2", "--output"]


@pytest.mark.parametrize("again", ["slurm", "local"])
def test_repeated_command_leaves_queued_jobs_their_work(
    again: str,
    command: list[str],
    queue: Queue,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone, arrays = tmp_path / "alone", tmp_path / "arrays"
    assert main([*command, str(alone)]) == 0
    assert main([*command, str(arrays), "--executor", "slurm"]) == 0
    submitted = dict(queue.scripts)
    # Two elements of the first array have run: what is missing now is another list than before.
    assert queue.run("101", 2) == [0, 0]
    capsys.readouterr()
    assert main([*command, str(arrays), "--executor", again, "--max-bad-lines", "7"]) == 2
    shown = capsys.readouterr().err
    assert "reading-0 (job 101), pairs-0 (job 102)" in shown
    assert "scancel 101 102 103 104 105" in shown
    assert queue.scripts == submitted
    assert json.loads((arrays / "plan.json").read_bytes())["max_bad_lines"] == 0
    # Each element finds the tasks that it was submitted for; those that are done are passed over.
    for job in submitted:
        assert set(queue.run(job)) == {0}
    assert finished_corpus(arrays) == finished_corpus(alone)


def test_jobs_of_a_killed_submission_do_nothing(
    command: list[str], queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = [*command, str(output), "--executor", "slurm", "--tasks", "2"]
    assert main(arguments) == 0
    first = len(queue.scripts)
    queue.ended |= queue.scripts.keys()  # as far as the command can know
    assert main(arguments) == 0
    capsys.readouterr()
    assert queue.run("101", 1) == [2]
    assert "its jobs do this work; this one does nothing" in capsys.readouterr().err
    assert not (output / "work/counts").exists()
    for job in list(queue.scripts)[first:]:
        assert set(queue.run(job)) == {0}
    assert (output / "summary.json").exists()


def test_two_commands_at_once_do_not_both_submit(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path)
    first = add_job(folder, begin_submission(folder), "reading-0", "1")
    second = begin_submission(folder)
    with pytest.raises(DataError, match=r"another command submits .* job 2 of this"):
        add_job(folder, first, "summary", "2")
    assert read_submission(folder) == second


def test_unknown_jobs_are_not_taken_for_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = WorkFolder(tmp_path)
    refuse_queued(folder)
    add_job(folder, begin_submission(folder), "reading-0", "17")

    def no_answer(job: str) -> bool:
        raise SlurmError("there is no scontrol on this machine")

    monkeypatch.setattr(submissions, "has_ended", no_answer)
    with pytest.raises(Exception, match="jobs 17, and whether these have ended is not known: th"):
        refuse_queued(folder)
    folder.submission.write_text('{"name": 1}')
    with pytest.raises(DataError, match="is not as this command writes it"):
        refuse_queued(folder)


@pytest.mark.parametrize(
    ("states", "expected"),
    [(["COMPLETED", "FAILED"], True), (["COMPLETED", "PENDING"], False), (["RUNNING"], False)],
)
def test_array_has_ended_when_all_its_elements_have(
    states: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        f"JobId={7 + n} ArrayJobId=7 ArrayTaskId={n} JobState={state} Reason=None Restarts=0"
        " ExitCode=0:0\n"
        for n, state in enumerate(states)
    ]
    monkeypatch.setattr(jobs, "_slurm", lambda *command: "".join(lines))
    assert has_ended("7") is expected


def test_job_that_slurm_has_purged_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def purged(*command: str) -> str:
        raise SlurmError("slurm_load_jobs error: Invalid job id specified")

    monkeypatch.setattr(jobs, "_slurm", purged)
    assert has_ended("7")
