"""Collective stages without a process group, and in a group of one rank."""

from collections.abc import Callable
from typing import Any

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.runtime.collective import (
    StageError,
    gather,
    on_all_ranks,
    on_rank0,
    require_same,
)

Stage = Callable[..., Any]


def fail(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("stage", [on_all_ranks, on_rank0])
def test_stage_gives_the_works_result_without_a_group(stage: Stage) -> None:
    # Not even a value that cannot be pickled has to be.
    value = stage("reading", lambda: fail)
    assert value is fail
    assert gather(3) == [3]


@pytest.mark.parametrize("stage", [on_all_ranks, on_rank0])
def test_error_of_the_user_keeps_class_text_and_cause(
    stage: Stage, single_rank: ProcessGroupCollection
) -> None:
    with pytest.raises(DataError, match=r"^no such file$") as caught:
        stage("reading", fail(DataError("no such file")))
    assert isinstance(caught.value.__cause__, DataError)


@pytest.mark.parametrize("stage", [on_all_ranks, on_rank0])
def test_other_errors_are_told_with_the_stage_or_raised_as_they_are(stage: Stage) -> None:
    with pytest.raises(StageError, match=r"^reading failed on rank 0: PermissionError: \[Errno"):
        stage("reading", fail(PermissionError(13, "Permission denied", "/x")))
    with pytest.raises(ConfigError, match=r"^reading failed on rank 0: ValueError: odd$"):
        stage("reading", fail(ValueError("odd")), error_class=ConfigError)
    with pytest.raises(ValueError, match=r"^odd$"):
        stage("reading", fail(ValueError("odd")))


def test_one_rank_is_like_itself() -> None:
    require_same("settings", {"lr": float("inf")}, error_class=ConfigError, remedy="")
