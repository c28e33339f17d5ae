"""Stages of two ranks: what fails on one fails on both, and neither waits for the other."""

import json

import pytest

from tests.distributed.launcher import HERE, ranks

NO_SPACE = "OSError: [Errno 28] No space left on device"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """How each stage ended, by rank."""
    out = tmp_path_factory.mktemp("collective")
    done = ranks(2, HERE / "worker_collective.py", str(out), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("user error on rank 1", "DataError: on rank 1: x.idx is missing"),
        ("user errors on both", "ConfigError: first"),
        ("full disk on rank 1", f"StageError: mixing failed on rank 1: {NO_SPACE}"),
        (
            "full disks as checkpoint errors",
            f"CheckpointError: mixing failed on rank 0: {NO_SPACE}; on rank 1: {NO_SPACE}",
        ),
        (
            "bug on rank 1 as a checkpoint error",
            "CheckpointError: mixing failed on rank 1: KeyError: 'x'",
        ),
        ("rank 0 well", "by rank 0"),
        ("rank 0 user error", "DataError: damaged"),
        ("rank 0 full disk", f"StageError: reading failed on rank 0: {NO_SPACE}"),
        ("the same", "None"),
        (
            "not the same",
            "ConfigError: settings differ between ranks: seed: rank 0 0, rank 1 1; extra: rank 0"
            " not there, rank 1 1; use the same",
        ),
        ("same kernels", "None"),
        (
            "other backend on rank 1",
            "ConfigError: expert backends differ between ranks: expert_backend: rank 0 triton, rank"
            " 1 cute; run on GPUs of one kind, or name one that all can use with --expert-backend",
        ),
        (
            "no fused kernels on rank 1",
            "ConfigError: fused kernels differ between ranks: problem: rank 0 None, rank 1 triton"
            " is missing; mend that, or give --fused-kernels off",
        ),
        ("fused kernels off", "None"),
        ("gather", "[0, 10]"),
        ("broadcast", "0"),
        ("after", "[0, 1]"),
    ],
)
def test_both_ranks_end_alike(stage: str, expected: str, found: list[dict[str, str]]) -> None:
    assert [each[stage] for each in found] == [expected] * 2


def test_work_on_all_ranks_gives_each_its_own_result(found: list[dict[str, str]]) -> None:
    assert [each["well"] for each in found] == ["by rank 0", "by rank 1"]


def test_work_of_rank_0_is_done_by_no_other(found: list[dict[str, str]]) -> None:
    assert [each["ran"] for each in found] == ["[0]", "[]"]


@pytest.mark.parametrize(
    ("stage", "rank", "told"),
    [
        ("bug on rank 1", 1, "StageError: mixing failed on rank 1: KeyError: 'x'"),
        ("rank 0 bug", 0, "StageError: reading failed on rank 0: KeyError: 'x'"),
    ],
)
def test_bug_keeps_its_traceback_on_its_own_rank(
    stage: str, rank: int, told: str, found: list[dict[str, str]]
) -> None:
    assert found[rank][stage] == "KeyError: 'x'"
    assert found[1 - rank][stage] == told
