"""The architecture of a saved run against that of the run that goes on."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron.trainer.checkpoint.find import FoundCheckpoint
from megatron.trainer.checkpoint.saved_run import check_architecture
from megatron.trainer.errors import CheckpointError
from megatron.trainer.records.run_dir import CONFIG_NAME


@dataclass(frozen=True)
class Model:
    """An architecture of a width, and of a switch that came with a later version."""

    width: int
    is_new: bool

    def architecture(self) -> dict[str, object]:
        return {"width": self.width, "is_new": self.is_new}

    def addable(self, saved: Mapping[str, object]) -> Mapping[str, str]:
        del saved
        return {}

    def before_added(self) -> Mapping[str, object]:
        return {"is_new": False}


@pytest.mark.parametrize(
    ("saved", "model", "message"),
    [
        ("width: 4", Model(4, False), None),
        ("width: 4", Model(4, True), "is_new: checkpoint False, this run True"),
        ("{width: 4, is_new: true}", Model(4, True), None),
        ("{width: 4, is_new: true}", Model(4, False), "is_new: checkpoint True, this run False"),
        ("is_new: false", Model(4, False), "width: checkpoint None, this run 4"),
    ],
)
def test_a_field_that_came_later_is_what_earlier_runs_were(
    saved: str, model: Model, message: str | None, tmp_path: Path
) -> None:
    (tmp_path / CONFIG_NAME).write_text(saved)
    found = FoundCheckpoint(path=tmp_path, iteration=1)
    if message is None:
        check_architecture(found, model)
        return
    with pytest.raises(CheckpointError, match=re.escape(message)):
        check_architecture(found, model)


@dataclass(frozen=True)
class Addable(Model):
    """An architecture whose switch weights of other runs can get."""

    def addable(self, saved: Mapping[str, object]) -> Mapping[str, str]:
        return {"is_new": ".new"} if self.is_new and not saved.get("is_new") else {}


def test_what_can_be_added_may_differ_and_is_returned(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text("width: 4")
    found = FoundCheckpoint(path=tmp_path, iteration=1)
    assert check_architecture(found, Addable(4, True)) == {"is_new": ".new"}
    assert check_architecture(found, Addable(4, False)) == {}
    with pytest.raises(CheckpointError, match="width: checkpoint 4, this run 5") as refused:
        check_architecture(found, Addable(5, True))
    assert "is_new" not in str(refused.value)
