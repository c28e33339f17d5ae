"""From flags to samples: what is read, how it is cut, and what is refused."""

import pickle
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.build import DataBundle, build_data
from megatron.trainer.data.data_path import unique_names
from megatron.trainer.data.describe import describe
from megatron.trainer.data.entropy import token_counts, unigram_entropy
from megatron.trainer.data.source import WindowSource
from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.errors import ConfigError, DataError

VOCAB = 1000
BATCH: dict[str, int] = {
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "data_parallel_rank": 0,
    "data_parallel_size": 1,
}


def write(prefix: Path, lengths: Sequence[int]) -> str:
    """A token file whose tokens are their own positions."""
    starts = np.cumsum([0, *lengths])
    with TokenFileWriter(str(prefix), vocab_size=VOCAB) as writer:
        for start, stop in pairwise(starts):
            writer.add_document(range(start, stop))
        writer.finish()
    return str(prefix)


def build(*, seq_length: int = 4, seed: int = 1, **fields: Any) -> DataBundle:
    cfg = DataConfig(**fields)
    return build_data(cfg, vocab_size=VOCAB, seq_length=seq_length, seed=seed)


def ranges(bundle: DataBundle) -> dict[str, tuple[int, int]]:
    """First and last-plus-one token of each source and validation set."""
    sources = {f"train {s.name}": s for s in bundle.train.sources}
    sources |= {f"valid {name}": v.source for name, v in bundle.validation.items()}
    return {
        name: (s.start_token, s.stop_token)
        for name, s in sources.items()
        if isinstance(s, WindowSource)
    }


def test_one_prefix_is_the_whole_training_data(tmp_path: Path) -> None:
    bundle = build(data_path=(write(tmp_path / "a_text_document", [20, 30]),))
    assert ranges(bundle) == {"train a": (0, 50)}
    assert bundle.validation == {}


def test_weights_decide_how_often_each_file_is_drawn(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / name, [50]) for name in ("a", "b")]
    bundle = build(data_path=("3", prefixes[0], "1", prefixes[1]))
    for _ in range(5):
        bundle.train.next_global_batch(**BATCH)
    assert bundle.train.consumed_per_source() == {"a": 30, "b": 10}


def test_split_cuts_at_the_document_start_nearest_to_the_share_and_validation_is_last(
    tmp_path: Path,
) -> None:
    prefix = write(tmp_path / "a", [20, 30, 38, 12])
    assert ranges(build(data_path=(prefix,), split="90,10")) == {
        "train a": (0, 88),
        "valid a": (88, 100),
    }
    assert ranges(build(data_path=(prefix,), split="4,6"))["train a"] == (0, 50)
    assert ranges(build(data_path=(prefix,), split="1,999"))["train a"] == (0, 20)
    assert ranges(build(data_path=(prefix,), split="999,1"))["train a"] == (0, 88)


def test_training_reads_no_validation_token(tmp_path: Path) -> None:
    bundle = build(data_path=(write(tmp_path / "a", [20, 30, 38, 12]),), split="9,1")
    seen: set[int] = set()
    for _ in range(6):
        for batch in bundle.train.next_global_batch(**BATCH):
            seen |= set(batch.tokens.flatten().tolist()) | set(batch.labels.flatten().tolist())
    assert max(seen) < 88
    valid = bundle.validation["a"].source
    assert valid.read_window(0).tolist() == [88, 89, 90, 91, 92]


def test_named_validation_files_are_used_whole_beside_the_split(tmp_path: Path) -> None:
    train, other = write(tmp_path / "a", [50, 50]), write(tmp_path / "b", [30])
    bundle = build(data_path=(train,), split="1,1", valid_data_path=(f"out={other}",))
    assert ranges(bundle) == {"train a": (0, 50), "valid a": (50, 100), "valid out": (0, 30)}


def test_mock_data_needs_no_file_and_validates_on_other_tokens() -> None:
    bundle = build(mock_data=True)
    batches = bundle.train.next_global_batch(**BATCH)
    valid = next(bundle.validation["mock"].batches(1, **BATCH))
    assert [batch.tokens.shape for batch in batches] == [(4, 4), (4, 4)]
    assert batches[0].tokens.tolist() != valid[0].tokens.tolist()
    assert max(int(batch.tokens.max()) for batch in batches) < VOCAB


def test_description_counts_documents_tokens_windows_and_epochs(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "a", [20, 30, 38, 12]), write(tmp_path / "b", [41, 9])]
    bundle = build(data_path=("3", prefixes[0], "1", prefixes[1]), split="8,2")
    keys = ("use", "source", "weight", "documents", "tokens", "windows", "epochs")
    assert [tuple(row[key] for key in keys) for row in describe(bundle, train_samples=84)] == [
        ("train", "a", 0.75, 3, 88, 21, 3.0),
        ("train", "b", 0.25, 1, 41, 10, 2.1),
        ("validation", "a", None, 1, 12, 2, None),
        ("validation", "b", None, 1, 9, 2, None),
    ]
    assert [row["epochs"] for row in describe(bundle)] == [None] * 4
    assert describe(build(mock_data=True), train_samples=8)[0]["tokens"] is None


def test_names_take_parent_folders_only_where_stems_collide() -> None:
    assert unique_names(["d/a_text_document", "d/b"]) == ["a", "b"]
    assert unique_names(["x/d/a", "y/d/a_text_document"]) == ["x/d/a", "y/d/a"]


def test_names_that_cannot_differ_are_refused() -> None:
    message = (
        "--data-path names d/a and d/a_text_document, which differ only by _text_document; names"
        " must differ without it; rename one, or write NAME=PREFIX"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        unique_names(["d/a", "d/a_text_document"])
    message = "--data-path names d/a 2 times; each file must be named once; add up its weights"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        unique_names(["d/a", "d/./a"])


PAIRS = "--data-path must be one PREFIX, or WEIGHT PREFIX pairs with weights > 0; "


@pytest.mark.parametrize(
    ("data_path", "message"),
    [
        (
            ("a", "b"),
            f"--data-path has 'a' where a weight belongs (a b); {PAIRS}give each file a weight, or"
            " leave it out",
        ),
        (
            ("0", "a", "1", "b"),
            f"--data-path has '0' where a weight belongs (0 a 1 b); {PAIRS}give each file a weight,"
            " or leave it out",
        ),
        (
            ("nan", "a"),
            f"--data-path has 'nan' where a weight belongs (nan a); {PAIRS}give each file a weight,"
            " or leave it out",
        ),
        (
            ("a", "1", "b"),
            f"--data-path has 3 parts (a 1 b); {PAIRS}give each file a weight",
        ),
    ],
)
def test_malformed_blend_is_refused(data_path: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build(data_path=data_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {},
            "neither --data-path nor --mock-data is given; a run needs one of them; name a token"
            " file's PREFIX, or train on random tokens with --mock-data",
        ),
        ({"mock_data": True, "seed": -1}, "--seed is -1; it must be >= 0; give another one"),
        *(
            (
                {"data_path": ("a",), "split": split},
                f"--split is {split!r}; it must be two numbers, training > 0 and validation >= 0;"
                " write for example 99,1, or 1,0 to hold nothing back",
            )
            for split in ("99", "98,1,1", "0,1", "1,-1", "a,b", "inf,1", "")
        ),
    ],
)
def test_flags_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build(**fields)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("b",), "--valid-data-path has 'b'; each must be NAME=PREFIX; give the set a name"),
        (("=b",), "--valid-data-path has '=b'; each must be NAME=PREFIX; give the set a name"),
        (
            ("v=b", "v=c"),
            "--valid-data-path names a set 'v' twice (b and c); names must differ; rename one",
        ),
        (
            ("a=b",),
            "--valid-data-path names a set 'a', and --split 1,1 holds one back under that name;"
            " names must differ; rename it",
        ),
    ],
)
def test_validation_names_must_be_given_and_differ(
    tmp_path: Path, sets: tuple[str, ...], message: str
) -> None:
    prefix = write(tmp_path / "a", [20, 20])
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build(data_path=(prefix,), split="1,1", valid_data_path=sets)


def test_split_of_a_single_document_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [40])
    message = (
        f"{prefix} has 1 document(s) and 40 tokens; --split cuts between documents, so it needs at"
        " least two; hold nothing back with --split 1,0, or give --valid-data-path"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        build(data_path=(prefix,), split="9,1")


def test_held_back_part_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [40, 4])
    with pytest.raises(
        DataError, match=re.escape("source 'a' has 4 tokens, but one window takes 5")
    ):
        build(data_path=(prefix,), split="9,1")


@pytest.mark.parametrize("position", ["first", "second", "validation"])
def test_every_file_is_verified_before_the_first_sample(tmp_path: Path, position: str) -> None:
    prefixes = {name: write(tmp_path / name, [40]) for name in ("first", "second", "validation")}
    damaged = Path(f"{prefixes[position]}.bin")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DataError, match=re.escape(f"{damaged} has 79 bytes")):
        build(
            data_path=("1", prefixes["first"], "1", prefixes["second"]),
            valid_data_path=(f"v={prefixes['validation']}",),
        )


def test_every_file_is_checked_against_the_vocabulary(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [40])
    with pytest.raises(DataError, match="token 39 has id 39, but the vocabulary has 39 ids"):
        build_data(DataConfig(data_path=(prefix,)), vocab_size=39, seq_length=4, seed=1)


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "ran")


def test_hostile_index_cache_beside_the_data_is_never_opened(tmp_path: Path) -> None:
    prefix, canary = write(tmp_path / "a", [40, 40]), tmp_path / "canary"
    cache = tmp_path / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)
    hostile = cache / "0123-GPTDataset-train-document_index.npy"
    hostile.write_bytes(pickle.dumps(Canary(canary)))
    np.load(hostile, allow_pickle=True)
    assert canary.read_text() == "ran", "the canary must be able to run, or the test shows nothing"
    canary.unlink()

    bundle = build(data_path=(prefix,), split="1,1", valid_data_path=(f"v={prefix}",))
    bundle.train.next_global_batch(**BATCH)
    assert list(bundle.validation["v"].batches(1, **BATCH))
    assert not canary.exists()


def test_entropy_of_a_uniform_vocabulary_is_its_logarithm() -> None:
    assert unigram_entropy(np.array([5, 5, 5, 5, 0])) == pytest.approx(np.log(4), abs=1e-12)
    assert unigram_entropy(np.array([0, 9])) == 0.0


def test_entropy_is_the_mean_loss_of_the_best_constant_prediction() -> None:
    tokens = np.array([0, 0, 0, 1, 2, 2])
    counts = token_counts(tokens, start_token=0, stop_token=6, vocab_size=4)
    loss = -np.log(counts / 6, where=counts > 0, out=np.zeros(4))[tokens].mean()
    assert unigram_entropy(counts) == pytest.approx(loss, abs=1e-12)


def test_counts_cover_the_range_alone_and_all_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.trainer.data.entropy._CHUNK_TOKENS", 2)
    tokens = np.array([3, 0, 0, 1, 2, 2, 3], dtype=np.uint16)
    counts = token_counts(tokens, start_token=1, stop_token=6, vocab_size=5)
    assert counts.tolist() == [2, 1, 2, 0, 0]


def test_entropy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="counts add up to 0; there must be at least one token"):
        unigram_entropy(np.zeros(3, dtype=np.int64))


def test_mock_data_overrides_a_recipes_files() -> None:
    bundle = build(mock_data=True, data_path=("missing",), valid_data_path=("also=missing",))
    assert [source.name for source in bundle.train.sources] == ["mock"]
    assert list(bundle.validation) == ["mock"]
