"""Tests submit without SLURM: what it checks, writes and asks; tests/slurm submit for real."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.records.history import PlannedEnd
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_app.slurm import jobs
from moe_app.slurm.jobs import Job, JobRequest, SlurmError, parse_job, poll_job
from moe_app.submission import submit


def request(run: Path, **changes: Any) -> JobRequest:
    settings: dict[str, Any] = {
        "name": "a",
        "run": run,
        "recipe": run / "slurm" / "recipe.yaml",
        "repository": run / "repository",
        "nodes": 2,
        "ranks_per_node": 4,
        "options": (),
        "variables": {},
        "comment": "for a test",
    }
    return JobRequest(**{**settings, **changes})


def test_dry_run_shows_everything_and_writes_nothing(
    here: Path, fake: object, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["a.yaml", "--nodes", "2", "--gpus-per-node", "4", "--save", "runs/x", "--dry-run"]
    more = ["--time", "1:00:00", "--partition", "gpu", "--sbatch=--exclusive", "--lr", "0.01"]
    assert submit.main([*command, *more]) == 0
    shown = capsys.readouterr().out
    assert "layout: 2 nodes x 4 ranks = 8; TP 1, PP 1 x 1, CP 1, EP 2, ETP 1, DP 8\n" in shown
    assert "step: 1 micro-batches of 2 sequences a data parallel rank\n" in shown
    assert "length: 50 steps of 1,024 tokens = 51,200 tokens\n" in shown
    run = here / "runs" / "x"
    for line in (
        "#SBATCH --job-name=x",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --output={run}/logs/%x-%j.out",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --time=1:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --exclusive",
        "export RANKS_PER_NODE=4",
        f"exec bash {submit.REPOSITORY}/examples/slurm/pretrain.sbatch"
        f" {run}/slurm/recipe.yaml {run}",
    ):
        assert f"\n{line}\n" in shown
    assert sorted(path.name for path in here.iterdir()) == ["a.yaml", "bin"]


def test_submitted_recipe_is_the_resolved_one(
    here: Path, fake: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(
        "sbatch", '[[ "$1" == --parsable && -d runs/x/logs ]] && echo "77;cluster"; cat "$2" > sent'
    )
    flags = ["--save", "runs/x", "--lr", "0.01"]
    assert submit.main(["a.yaml", "--nodes", "2", *flags]) == 0
    folder = here / "runs" / "x" / "slurm"
    assert f"submitted job 77: {folder}/job.sbatch\n" in capsys.readouterr().out
    assert (folder / "job_id").read_text() == "77\n"
    assert (here / "sent").read_text() == (folder / "job.sbatch").read_text()

    def parse(*argv: str) -> PretrainConfig:
        return parse_recipe(list(argv), prog="test", description="")

    assert parse("--config", str(folder / "recipe.yaml")) == parse("--config", "a.yaml", *flags)
    # While the job is active, its directory is in use.
    fake("scontrol", "echo JobId=77 JobState=PENDING Reason=Priority Restarts=0 ExitCode=0:0")
    assert submit.main(["a.yaml", "--nodes", "2", *flags]) == 2
    assert "ConfigError: job 77 (PENDING (Priority)) uses " in capsys.readouterr().err
    fake("scontrol", "echo JobId=77 JobState=FAILED Reason=x Restarts=0 ExitCode=1:0")
    assert submit.main(["a.yaml", "--nodes", "2", *flags]) == 0
    fake("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert submit.main(["a.yaml", "--nodes", "2", *flags]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--nodes", "3", "--save", "x"],
            "the number of ranks (3) must be a multiple of expert_tensor_parallel_size",
        ),
        (["--nodes", "16", "--save", "x"], "global_batch_size (16) must be a multiple of"),
        (["--nodes", "2"], "there is no run directory; give --save DIR"),
        (
            ["--gpus-per-node", "2", "--ranks-per-node", "4", "--save", "x"],
            "--gpus-per-node 2 and --ranks-per-node 4 both set the number of ranks per node",
        ),
        (
            ["--nodes", "2", "--container-mounts", "a:b", "--save", "x"],
            "--container-mounts needs --container-image",
        ),
        (["--nodes", "2", "--save", "x", "--job-name", "a\nb"], "cannot be a line of a batch"),
        (["--nodes", "2", "--save", "x", '--sbatch=--comment="'], "has a quote or backslash"),
    ],
)
def test_invalid_request_is_refused_before_anything_is_written(
    flags: list[str],
    message: str,
    here: Path,
    fake: object,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert submit.main(["a.yaml", *flags]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["a.yaml", "bin"]


@pytest.mark.parametrize("seconds", ["-1", "nan", "x"])
def test_invalid_poll_interval_is_refused_before_anything_is_submitted(
    seconds: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        submit.main(["a.yaml", "--nodes", "2", "--save", "x", "--poll", seconds])
    assert f"--poll: '{seconds}' must be from 0.1 to 3600 seconds" in capsys.readouterr().err
    assert not (here / "x").exists()


def test_corrupt_job_id_file_is_named(
    here: Path, fake: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "x" / "slurm").mkdir(parents=True)
    (here / "x" / "slurm" / "job_id").write_bytes(b"\xff\xfe")
    assert submit.main(["a.yaml", "--nodes", "2", "--save", "x"]) == 2
    assert "job_id holds '" in capsys.readouterr().err


def test_job_that_requests_no_cores_gives_a_warning(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["a.yaml", "--nodes", "2", "--save", "x", "--dry-run"]
    for option, is_warned in (("--mem=0", True), ("--exclusive", False), ("-c8", False)):
        assert submit.main([*command, f"--sbatch={option}"]) == 0
        assert ("cores: none are requested" in capsys.readouterr().out) is is_warned


def test_unknown_flag_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        submit.main(["a.yaml", "--nodes", "2", "--save", "x", "--train-itres", "3"])
    assert exit_.value.code == 2
    assert "--train-iters" in capsys.readouterr().err


def test_missing_slurm_is_reported(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(here))
    assert submit.main(["a.yaml", "--nodes", "2", "--save", "x"]) == 2
    assert "SlurmError: there is no sbatch on this machine" in capsys.readouterr().err


def test_message_of_a_rejected_job_is_shown(
    here: Path, fake: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake("sbatch", "echo 'invalid partition specified: gold' >&2; exit 1")
    assert submit.main(["a.yaml", "--nodes", "2", "--save", "x"]) == 2
    assert "job.sbatch: invalid partition specified: gold" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["plain", "with blank", "quo'te", 'dou"ble', "$HOME", "a;b"])
def test_script_passes_any_path_unchanged(name: str, tmp_path: Path) -> None:
    repository = tmp_path / name
    (repository / "examples" / "slurm").mkdir(parents=True)
    pretrain = repository / "examples" / "slurm" / "pretrain.sbatch"
    pretrain.write_text('printf "%s\\n" "$REPO" "$CONTAINER_IMAGE" "$@"\n')
    text = request(
        Path("/runs"),
        repository=repository,
        recipe=tmp_path / name / "a.yaml",
        variables={"CONTAINER_IMAGE": name},
    ).script()
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, check=True, timeout=300
    )
    recipe_path = tmp_path / name / "a.yaml"
    assert done.stdout.splitlines() == [str(repository), name, str(recipe_path), "/runs"]


def test_directive_with_a_space_is_quoted() -> None:
    text = request(Path("/my runs/x"), options=("--comment=two words",)).script()
    assert '#SBATCH "--output=/my runs/x/logs/%x-%j.out"\n' in text
    assert '#SBATCH "--comment=two words"\n' in text


SHOWN = "JobId=12 ArrayJobId=9 JobName=x JobState={} Reason={} Dependency=(null) Restarts=1"


@pytest.mark.parametrize(
    ("state", "code", "has_ended", "status"),
    [
        ("COMPLETED", "0:0", True, 0),
        ("FAILED", "75:0", True, 75),
        ("FAILED", "0:9", True, 137),
        ("TIMEOUT", "0:15", True, 143),
        # Final states without an exit status are not a success.
        ("CANCELLED", "0:0", True, 1),
        ("NODE_FAIL", "0:0", True, 1),
        ("RUNNING", "0:0", False, 1),
        ("COMPLETING", "0:0", False, 1),
        ("REQUEUED", "0:0", False, 1),
    ],
)
def test_job_is_parsed_from_scontrol(state: str, code: str, has_ended: bool, status: int) -> None:
    job = parse_job(f"{SHOWN.format(state, 'None')} ExitCode={code} Command=/a b=c\n")
    assert (job.job_id, job.state, job.restarts) == ("12", state, 1)
    assert (job.has_ended, job.exit_status) == (has_ended, status)


def test_pending_job_shows_its_reason() -> None:
    job = parse_job(f"{SHOWN.format('PENDING', 'Resources')} ExitCode=0:0")
    assert str(job) == "PENDING (Resources), restart 1"


def test_output_without_a_job_is_refused() -> None:
    with pytest.raises(SlurmError, match="did not print a job: 'No jobs in the system'"):
        parse_job("No jobs in the system")


def job(state: str) -> Job:
    return Job(job_id="12", state=state, reason="None", restarts=0, status=0)


def test_polling_survives_an_unreachable_controller_and_ends_with_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: Iterator[Job | Exception | None] = iter(
        [job("PENDING"), SlurmError("timed out"), job("RUNNING"), job("COMPLETED"), job("RUNNING")]
    )

    def query_job(job_id: str) -> Job | None:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(jobs, "query_job", query_job)
    states = [each.state for each in poll_job("12", poll_s=0)]
    assert states == ["PENDING", "RUNNING", "COMPLETED"]


def test_polling_a_purged_job_or_a_dead_controller_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "query_job", lambda job_id: None)
    with pytest.raises(SlurmError, match="SLURM has no job 12 any more"):
        list(poll_job("12", poll_s=0))

    def silent(job_id: str) -> Job:
        raise SlurmError("timed out")

    monkeypatch.setattr(jobs, "query_job", silent)
    monkeypatch.setattr(jobs, "UNREACHABLE_S", 0.05)
    with pytest.raises(SlurmError, match="timed out"):
        list(poll_job("12", poll_s=0.02))


def test_progress_shows_share_speed_and_time_left(here: Path) -> None:
    cfg = parse_recipe(["--config", "a.yaml"], prog="test", description="")
    record = {"iteration": 20, "lm_loss": 2.5, "tokens_per_second": 512.0}
    # 30 steps of 16 x 64 tokens at 512 tokens a second: a minute.
    assert submit.progress(record, cfg) == (
        "step 20 of 50 (40%), lm_loss 2.5000, 512 tokens/s, 0:01:00 left"
    )
    assert submit.progress({**record, "lm_loss": None, "tokens_per_second": None}, cfg) == (
        "step 20 of 50 (40%)"
    )


def test_error_names_the_directory_that_cannot_be_written(
    here: Path, fake: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "file").write_text("")
    assert submit.main(["a.yaml", "--nodes", "2", "--save", "file/x"]) == 2
    assert f"ConfigError: cannot write to {here}/file/x/slurm: " in capsys.readouterr().err


def test_environment_is_not_written_anywhere(
    here: Path, fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hidden-token")
    fake("sbatch", "echo 77")
    assert submit.main(["a.yaml", "--nodes", "2", "--save", "x"]) == 0
    for path in (here / "x").rglob("*"):
        assert path.is_dir() or "hidden-token" not in path.read_text()


def test_progress_follows_what_the_run_says_of_its_length(here: Path) -> None:
    """25 steps instead of 50, after a job with half of the batch."""
    cfg = parse_recipe(["--config", "a.yaml"], prog="test", description="")
    record = {"iteration": 20, "lm_loss": 2.5, "tokens_per_second": 512.0, "consumed_tokens": 8}
    end = PlannedEnd(train_iters=25, train_tokens=8 + 512 * 90)
    assert submit.progress(record, cfg, end) == (
        "step 20 of 25 (80%), lm_loss 2.5000, 512 tokens/s, 0:01:30 left"
    )
