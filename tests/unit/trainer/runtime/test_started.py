"""What the environment says of how a process was started; a real srun: tests/slurm."""

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.trainer.errors import ConfigError
from megatron.trainer.runtime.launch import initialize
from megatron.trainer.runtime.started import (
    MissingTorchrunError,
    check_rendezvous,
    check_tasks,
    rank_and_world_size,
)
from moe_app.doctor import diagnose
from moe_app.infer import generate, score
from moe_app.pretrain import command
from moe_app.pretrain.config import PretrainConfig

PID = 4242
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_NPROCS": "16", "SLURM_PROCID": "0"}
"""A batch script is one process, however many tasks its job asked for."""
STEP = {**BATCH, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
SHELL = {**STEP, "SLURM_TASK_PID": "4000"}
ITSELF = {**STEP, "SLURM_TASK_PID": str(PID)}
RANKS = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "29500",
}

STARTED: list[tuple[str, dict[str, str], bool, int | None]] = [
    # What it is, its variables, whether it has a terminal, and its number if it is refused.
    ("alone", {}, False, None),
    ("batch script", BATCH, False, None),
    ("salloc's shell", {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, True, None),
    ("salloc's shell in a step", {**BATCH, "SLURM_STEP_NUM_TASKS": "1"}, True, None),
    ("step of one task", {**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, False, None),
    ("typed into srun --pty bash", SHELL, True, None),
    ("the same with --mpi=pmi2", {**SHELL, "PMI_SIZE": "2", "PMI_RANK": "0"}, True, None),
    ("torchrun below srun", {**STEP, **RANKS}, False, None),
    ("mpirun of one", {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, False, None),
    ("unreadable count", {"SLURM_STEP_NUM_TASKS": "many"}, False, None),
    ("srun python", {**ITSELF, "SLURM_PROCID": "1"}, False, 1),
    ("srun script.sh", SHELL, False, 0),
    ("srun --pty python", ITSELF, True, 0),
    ("srun with a world size by hand", {**ITSELF, "WORLD_SIZE": "2"}, False, 0),
    ("srun --mpi=pmi2", {**ITSELF, "PMI_SIZE": "2", "PMI_RANK": "1"}, False, 1),
    ("mpirun", {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, True, 3),
    ("mpirun in a job", {**BATCH, "OMPI_COMM_WORLD_SIZE": "4"}, False, 0),
    ("mpiexec in a shell", {**SHELL, "PMI_SIZE": "4", "PMI_RANK": "2"}, True, 2),
    ("MVAPICH", {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "2"}, False, 2),
]


@pytest.mark.parametrize(
    ("environment", "has_terminal", "task"),
    [pytest.param(*row, id=name) for name, *row in STARTED],
)
def test_one_of_several_tasks_without_a_rank_is_refused(
    environment: dict[str, str], has_terminal: bool, task: int | None
) -> None:
    found = None
    try:
        check_tasks(environment, pid=PID, has_terminal=lambda: has_terminal)
    except MissingTorchrunError as error:
        found = error.task
    assert found == task


def test_refusal_names_launcher_count_and_torchruns_command() -> None:
    for environment, expected in (
        (
            ITSELF,
            "srun has started 2 tasks (SLURM_STEP_NUM_TASKS is 2) without torchrun, so none has a"
            " RANK, and each would be a run of its own; start one torchrun on each node, which"
            " starts the ranks: srun --ntasks-per-node=1 torchrun --nnodes 2 ",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "4"},
            "mpirun has started 4 tasks (OMPI_COMM_WORLD_SIZE is 4) without torchrun, ",
        ),
    ):
        with pytest.raises(MissingTorchrunError, match=f"^{re.escape(expected)}"):
            check_tasks(environment, pid=PID, has_terminal=lambda: False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": "1"}, (0, 1)),
        (RANKS, (1, 2)),
        ({"RANK": "0"}, "RANK is 0, but WORLD_SIZE is not set; ranks need all of RANK, WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set; ranks need all of RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2; ranks are counted from 0"),
        ({"RANK": "a"}, "RANK is 'a'; it must be a whole number from 0 on; start with torchrun"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'; it must be a whole number from 0 on"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number from 1"),
    ],
)
def test_rank_and_world_size_go_together(
    environment: dict[str, str], expected: tuple[int, int] | str
) -> None:
    if isinstance(expected, tuple):
        assert rank_and_world_size(environment) == expected
    else:
        with pytest.raises(ConfigError, match=f"^{re.escape(expected)}"):
            rank_and_world_size(environment)


def test_rank_needs_every_variable_of_the_rendezvous() -> None:
    check_rendezvous({})
    check_rendezvous(RANKS)
    for name in RANKS.keys() - {"RANK"}:
        with pytest.raises(ConfigError, match=f"but {name} is not set; ranks need all of"):
            check_rendezvous({each: value for each, value in RANKS.items() if each != name})
    for name, wrong in (("MASTER_PORT", "99999"), ("MASTER_PORT", "http"), ("LOCAL_RANK", "1.0")):
        with pytest.raises(ConfigError, match=rf"^{name} is '?{wrong}'?; it must be a "):
            check_rendezvous({**RANKS, name: wrong})


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make this process one of two tasks that srun starts."""
    for name in ("RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def become(number: int) -> None:
        for name, value in {**STEP, "SLURM_PROCID": str(number)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SLURM_TASK_PID", str(os.getpid()))

    return become


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": command.main,
    "generate": generate.main,
    "score": score.main,
    "doctor": diagnose.main,
}
FLAGS = {
    "pretrain": ["--mock-data", "--train-iters", "1", "--save", "new"],
    "generate": ["--load", "old", "--prompt", "a", "--output", "new"],
    "score": ["--load", "old", "--input", "in", "--output", "new"],
    "doctor": [],
}


@pytest.mark.parametrize(("name", "number"), [*itertools.product(COMMANDS, (0, 1))])
def test_every_distributed_command_refuses_before_it_writes(
    name: str,
    number: int,
    task: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task(number)
    monkeypatch.chdir(tmp_path)
    assert COMMANDS[name](FLAGS[name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    # Task 0 speaks for all.
    assert (
        err.startswith("MissingTorchrunError: srun has started 2 tasks") if number == 0 else not err
    )
    assert list(tmp_path.iterdir()) == []


def test_own_training_script_is_refused_too(task: Callable[[int], None]) -> None:
    task(1)
    with pytest.raises(MissingTorchrunError):
        initialize(PretrainConfig())


def test_rank_that_is_no_number_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "first")
    assert command.main(["--mock-data"]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: RANK is 'first'; it must be a whole")


def test_rank_without_master_addr_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert command.main(["--mock-data", "--train-iters", "1"]) == 2
    assert "RANK is 0 and WORLD_SIZE 1, but MASTER_ADDR is not set" in capsys.readouterr().err
