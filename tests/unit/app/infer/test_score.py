"""Compare batches, scores and their files with plain softmaxes and lists."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron.trainer.data.jsonl import TextLines
from megatron.trainer.errors import DataError
from megatron.trainer.inference.lines import OutputFile, read_tokens
from megatron.trainer.inference.scoring import compute_logits, pad, plan_batches, score

VOCAB = 7


@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    tokens_per_batch=st.integers(1, 120),
)
def test_every_row_is_in_exactly_one_batch_within_the_limit(
    lengths: list[int], tokens_per_batch: int
) -> None:
    batches = plan_batches(lengths, tokens_per_batch=tokens_per_batch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        width = max(lengths[index] for index in batch)
        assert len(batch) * width <= tokens_per_batch or len(batch) == 1
    ordered = [lengths[index] for batch in batches for index in batch]
    assert ordered == sorted(lengths, reverse=True)


def test_rows_of_equal_length_fill_batches() -> None:
    assert [len(batch) for batch in plan_batches([10] * 10, tokens_per_batch=40)] == [4, 4, 2]


def test_labels_are_tokens_shifted_by_one() -> None:
    tokens, positions, labels = pad([[1, 2, 3], [4, 5]])
    assert tokens.tolist() == [[1, 2], [4, 5]]
    assert positions.tolist() == [[0, 1], [0, 1]]
    assert labels.tolist() == [[2, 3], [5, 0]]


class HistoryModel:
    """Computes logits that depend on every token up to their own."""

    is_output_rank = True

    def __init__(self) -> None:
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        self.shapes: list[tuple[int, ...]] = []

    def logits(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        assert tokens.shape == position_ids.shape
        self.shapes.append(tuple(tokens.shape))
        return self.table[tokens].cumsum(dim=1)

    def log_probs(self, tokens: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        log_probs = self.logits(tokens, position_ids).log_softmax(dim=-1)
        return log_probs.gather(2, labels[..., None])[..., 0]


def reference_log_probs(model: HistoryModel, row: Sequence[int]) -> list[float]:
    """Compute log-probabilities of one row by a loop over its tokens."""
    found, state = [], torch.zeros(VOCAB)
    for token, after in itertools.pairwise(row):
        state = state + model.table[token]
        found.append(float(state[after] - state.exp().sum().log()))
    return found


def rows_of(*lengths: int) -> dict[int, list[int]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return dict(enumerate(rows))


@pytest.mark.parametrize("tokens_per_batch", [1, 9, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_together_score_every_row_once(tokens_per_batch: int, size: int) -> None:
    rows = rows_of(4, 1, 9, 2, 4, 3)
    scores: dict[int, list[float]] = {}
    passes = set()
    for rank in range(size):
        model = HistoryModel()
        found = score(
            model,
            rows,
            tokens_per_batch=tokens_per_batch,
            data_parallel_rank=rank,
            data_parallel_size=size,
        )
        assert not scores.keys() & found.keys()
        scores |= found
        passes.add(len(model.shapes))
    assert len(passes) == 1  # every pass is collective under expert parallelism
    assert scores.keys() == rows.keys() - {1}  # one token alone has nothing to predict
    for number, values in scores.items():
        assert values == pytest.approx(reference_log_probs(HistoryModel(), rows[number]), abs=1e-6)


def test_logits_reproduce_the_scores() -> None:
    rows = rows_of(4, 1, 9, 2)
    model = HistoryModel()
    share = {"tokens_per_batch": 20, "data_parallel_rank": 0, "data_parallel_size": 1}
    logits = compute_logits(model, rows, **share)
    scores = score(model, rows, **share)
    for number in scores:
        labels = torch.tensor(rows[number][1:])[:, None]
        assert logits[number].shape == (len(labels), VOCAB)
        found = logits[number].log_softmax(dim=-1).gather(1, labels)[:, 0]
        assert found.tolist() == pytest.approx(scores[number], abs=1e-6)


def test_rank_without_output_returns_nothing() -> None:
    class OtherRank(HistoryModel):
        is_output_rank = False

    share = {"tokens_per_batch": 20, "data_parallel_rank": 0, "data_parallel_size": 1}
    assert score(OtherRank(), rows_of(3, 4), **share) == {}
    assert compute_logits(OtherRank(), rows_of(3, 4), **share) == {}


def read(path: Path, **changes: Any) -> list[tuple[dict[str, Any], list[int]]]:
    settings: dict[str, Any] = {
        "text_key": "text",
        "encode": lambda text: [ord(letter) - ord("a") for letter in text],
        "vocab_size": VOCAB,
        "max_tokens": 5,
        "rule": "the rule",
        "written_keys": ("sum",),
    }
    return [
        (line.record, line.ids)
        for line in read_tokens(TextLines(str(path)), **{**settings, **changes})
    ]


def test_lines_hold_text_or_tokens(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "abc", "id": 4}\n{"tokens": [0, 6]}\n')
    assert read(path) == [
        ({"text": "abc", "id": 4}, [0, 1, 2]),
        ({"tokens": [0, 6]}, [0, 6]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON ("),
        ("[1]", "a JSON list; each line must be one JSON object; repair or remove the line"),
        (
            '{"txt": "a"}',
            "has neither key; each object needs one of 'text' (text) and 'tokens' (ids)",
        ),
        (
            '{"text": "a", "tokens": [1]}',
            "has 'text' and 'tokens'; each object needs one of 'text' (text) and 'tokens' (ids)",
        ),
        ('{"text": 3}', "'text' is a int; it must be a string; repair or remove the line"),
        ('{"text": "\\ud800"}', "'text' has a lone surrogate at character 0"),
        ('{"text": ""}', "'text' has no tokens; the model needs at least one"),
        ('{"tokens": []}', "'tokens' has no tokens; the model needs at least one"),
        ('{"tokens": "1 2"}', "'tokens' is a str; it must be a list of ids"),
        ('{"tokens": [1, 7]}', "'tokens' has 7 at index 1; ids are integers from 0 to 6"),
        ('{"tokens": [-1]}', "'tokens' has -1 at index 0; ids are integers from 0 to 6"),
        ('{"tokens": [true]}', "'tokens' has True at index 0; ids are integers"),
        ('{"tokens": [1.0]}', "'tokens' has 1.0 at index 0; ids are integers"),
        (
            '{"tokens": [1, 1, 1, 1, 1, 1]}',
            "'tokens' has 6 tokens; at most 5 are allowed, the rule; shorten or split it",
        ),
        (
            '{"text": "a", "sum": 1}',
            "has the key 'sum', which the output adds; keys are not overwritten; remove or rename",
        ),
    ],
)
def test_invalid_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=re.escape(f"{path}, line 2: {message}")):
        read(path)


def test_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'no'} does not exist")):
        read(tmp_path / "no")


def test_file_appears_when_finished(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with OutputFile(str(path)) as output:
        output.write_record({"text": "é"})
        assert path.read_text() == "old"
        output.finish()
    assert json.loads(path.read_text("utf-8")) == {"text": "é"}
    assert list(tmp_path.iterdir()) == [path]


def test_lone_surrogate_in_another_key_survives(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    record = {"note": "\ud800", "tokens": [1, 2]}
    with OutputFile(str(path)) as output:
        output.write_record(record)
        output.finish()
    assert json.loads(path.read_bytes()) == record


def test_unfinished_file_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), OutputFile(str(path)) as output:
        output.write_record({"text": "new"})
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_array_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "logits.npy"
    array = np.array([[1.5, np.nan]], dtype=np.float32)
    with OutputFile(str(path)) as output:
        output.write_array(array)
        output.finish()
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), array)


def test_invalid_output_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(f"output {tmp_path} is a directory")):
        OutputFile(str(tmp_path))
    missing = tmp_path / "no" / "out"
    with pytest.raises(DataError, match=re.escape(f"output {missing} is in no existing directory")):
        OutputFile(str(missing))
