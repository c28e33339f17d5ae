"""Kept log-probabilities of the reference: how they are computed, and whose are taken."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from megatron.trainer.checkpoint import FoundCheckpoint
from megatron.trainer.checkpoint.manifest import MANIFEST_NAME
from megatron.trainer.data.batch import Batch
from megatron.trainer.data.batch_views import DocumentRule
from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import atomic_write
from moe_app.align import preference, reference
from moe_app.align.preference import KTOObjective, text_log_probs
from moe_app.align.reference import KeptReference, LiveReference, keep_reference
from tests.distributed.preference_texts import source_of

SOURCE = source_of("preference", is_packed=False)
ALONE: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


def state(*, stages: int = 1) -> Any:
    return SimpleNamespace(
        ctx=SimpleNamespace(
            rank=0,
            data_parallel_rank=0,
            device=torch.device("cpu"),
            layout=SimpleNamespace(data=1, pipeline=stages),
            groups=SimpleNamespace(cp=ALONE, dp=ALONE),
        ),
        documents=DocumentRule(eod=None, reset_position_ids=True, reset_attention_mask=True),
    )


def config(cache: Path | None = None) -> Any:
    return SimpleNamespace(
        training=SimpleNamespace(micro_batch_size=1, seq_length=48, bf16=False),
        align=SimpleNamespace(reference_cache=None if cache is None else str(cache),
                              average_log_prob=False),
    )  # fmt: skip


def test_each_pass_has_a_micro_batch_for_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interleaved pipeline takes no fewer."""
    passes = []

    def ask(self: LiveReference, state: Any, batches: Sequence[Batch]) -> list[Tensor]:
        passes.append(len(batches))
        return [each.texts["index"] + each.texts["role"] / 2 for each in batches]

    monkeypatch.setattr(LiveReference, "__call__", ask)
    values = reference._compute(config(), state(stages=3), [], SOURCE)
    assert passes == [3, 3]  # of four pairs, the last of which is repeated
    assert values[:, :2].tolist() == [[row, row + 0.5] for row in range(4)]
    assert np.isnan(values[:, 2]).all()


Values = npt.NDArray[np.float32]


def keep(cache: Path, checkpoint: Path) -> Values:
    """Keep the values of a reference; return those that the run uses."""
    found = cast(FoundCheckpoint, SimpleNamespace(path=checkpoint))
    kept = keep_reference(config(cache), state(), found, {"train": SOURCE})
    assert isinstance(kept, KeptReference)
    return kept.values[0]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reference whose log-probabilities are all -1."""
    monkeypatch.setattr(reference, "load_reference", lambda *_: [])
    monkeypatch.setattr(reference, "_compute", lambda *_: np.full((4, 3), -1.0, np.float32))
    path = tmp_path / "reference"
    path.mkdir()
    (path / MANIFEST_NAME).write_text("this one")
    return path


def test_values_of_a_run_that_writes_at_the_same_time_are_not_taken(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = reference._write

    def raced(folder: Path, values: Values, facts: Any) -> None:
        write(folder, values, facts)
        write(folder, values - 5, {**facts, "reference": "of the other run"})

    monkeypatch.setattr(reference, "_write", raced)
    assert (keep(tmp_path / "kept", checkpoint) == -1.0).all()
    with pytest.raises(DataError, match="is of another reference: its reference is of the other"):
        keep(tmp_path / "kept", checkpoint)


def test_values_of_another_run_under_this_ones_description_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def raced(path: Path, **settings: Any) -> Iterator[Any]:
        with atomic_write(path, **settings) as file:
            yield file
        np.save(path, np.full((4, 3), -6.0, np.float32))

    monkeypatch.setattr(reference, "atomic_write", raced)
    assert (keep(tmp_path / "kept", checkpoint) == -1.0).all()
    with pytest.raises(DataError, match="is damaged: its SHA-256 is not that in"):
        keep(tmp_path / "kept", checkpoint)


def test_text_that_was_cut_before_its_answer_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two judged texts with their mismatched ones, the second of which has no counted token."""
    segments = torch.arange(4)[:, None].expand(4, 5)
    mask = torch.ones(4, 5)
    mask[3] = 0.0
    roles = torch.tensor([1, 0, 2, 2])
    batch = Batch(
        *(torch.zeros(4, 5, dtype=torch.int64),) * 2,
        mask,
        torch.arange(5)[None],
        segments=segments,
        texts={"index": torch.arange(4) % 2, "role": roles},
    )
    batch = preference.with_sizes(batch)
    means = text_log_probs(torch.full((4, 5), 2.0), batch, ALONE, is_average=True)
    assert means.tolist() == [-2.0, -2.0, -2.0, 0.0]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    objective = KTOObjective(lambda *_: [], beta=0.1, is_average=True)
    with_reference = Batch(**{**vars(batch), "texts": {**batch.texts, "reference": means - 1.0}})
    assert objective._divergence(state(), [with_reference], [means]).item() == 1.0
