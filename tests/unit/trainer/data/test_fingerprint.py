"""A token file exchanged for another of its size is noticed; one that only moved is not."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megatron.trainer.config.schema import DataConfig, PhaseConfig
from megatron.trainer.data import fingerprint as fingerprints
from megatron.trainer.data.build import build_data
from megatron.trainer.data.indexed import open_tokens
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.errors import DataError

ALONE: dict[str, int] = {
    "global_batch_size": 4,
    "micro_batch_size": 4,
    "data_parallel_rank": 0,
    "data_parallel_size": 1,
}


def write(prefix: Path, ids: npt.ArrayLike, lengths: tuple[int, ...] = ()) -> str:
    tokens = np.asarray(ids)
    with TokenFileWriter(str(prefix), vocab_size=500) as writer:
        for part in np.split(tokens, np.cumsum(lengths)):
            writer.add_document(part)
        writer.finish()
    return str(prefix)


def ids_of(seed: int, count: int = 81) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 500, count)


def stream(*parts: str, seed: int = 1, **fields: Any) -> SampleStream:
    data_path = parts if len(parts) == 1 else tuple(x for part in parts for x in ("1", part))
    cfg = DataConfig(data_path=data_path, num_workers=0, **fields)
    return build_data(cfg, vocab_size=500, seq_length=4, seed=seed).train


def state_after(drawn: SampleStream, batches: int = 1) -> dict[str, Any]:
    for _ in range(batches):
        drawn.next_global_batch(**ALONE)
    state: dict[str, Any] = json.loads(json.dumps(drawn.state_dict()))
    return state


def test_fingerprint_tells_tokens_and_documents_apart_and_nothing_else(tmp_path: Path) -> None:
    ids = ids_of(1)
    other = ids.copy()
    other[40] += 1 if other[40] < 499 else -1
    found = {
        name: open_tokens(write(tmp_path / name, tokens, lengths)).facts.fingerprint
        for name, tokens, lengths in (
            ("one", ids, (20,)),
            ("same", ids, (20,)),
            ("another_token", other, (20,)),
            ("other_documents", ids, (21,)),
        )
    }
    assert found["one"] == found["same"]
    assert len(set(found.values())) == 3
    assert re.fullmatch("[0-9a-f]{64}", found["one"])


def test_fingerprint_of_a_large_file_reads_blocks_from_its_first_token_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_NUM_BLOCKS", 3)
    monkeypatch.setattr(fingerprints, "_BLOCK_TOKENS", 10)
    ids = ids_of(2, 101)
    first = open_tokens(write(tmp_path / "a", ids)).facts.fingerprint
    blocks = [range(0, 10), range(45, 55), range(91, 101)]
    seen = []
    for at in range(101):
        changed = ids.copy()
        changed[at] = (changed[at] + 1) % 500
        if open_tokens(write(tmp_path / "a", changed)).facts.fingerprint != first:
            seen.append(at)
    assert seen == [at for block in blocks for at in block]


def test_exchanged_file_of_as_many_windows_is_refused_on_resume(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", ids_of(1)), write(tmp_path / "b", ids_of(2))
    before = stream(a, b)
    state = state_after(before)
    write(tmp_path / "b", ids_of(3))
    after = stream(a, b)
    old, new = (each.sources[1].fingerprint for each in (before, after))
    assert old and new
    message = (
        f"the checkpoint was trained on other data: source 'b' holds other tokens: checkpoint"
        f" {old[:16]}, this run {new[:16]}; a resumed run must read the same samples; restore the"
        " token files, or start the data anew with --finetune"
    )
    unchanged = after.state_dict()
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        after.load_state_dict(state)
    assert after.state_dict() == unchanged


def test_file_that_moved_or_got_another_name_goes_on(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", ids_of(1))
    whole = stream(prefix)
    state = state_after(whole)
    expected = whole.next_global_batch(**ALONE)[0].tokens.tolist()
    (tmp_path / "moved").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / "moved" / f"a{suffix}")
        shutil.copy(f"{prefix}{suffix}", tmp_path / "moved" / f"b{suffix}")
    for part in (f"{tmp_path}/moved/a", f"a={tmp_path}/moved/b"):
        after = stream(part)
        assert after.load_state_dict(state) == []
        assert after.next_global_batch(**ALONE)[0].tokens.tolist() == expected
    # Samples are shuffled by the source's name, so without it they would not be the same.
    message = (
        "the checkpoint was trained on other data: sources: checkpoint ['a'], this run ['b']; a"
        " resumed run must read the same samples; restore the data flags, or start the data anew"
        " with --finetune; source 'b' is the checkpoint's 'a' under another name: write a=PREFIX"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        stream(f"{tmp_path}/moved/b").load_state_dict(state)


def test_state_without_fingerprints_goes_on_and_later_ones_have_them(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", ids_of(1))
    state = state_after(stream(prefix))
    assert state.pop("fingerprints").keys() == {"a"}
    write(tmp_path / "a", ids_of(2))
    after = stream(prefix)
    assert after.load_state_dict(state) == []
    assert after.state_dict()["fingerprints"] == {"a": after.sources[0].fingerprint}


def test_random_tokens_have_none() -> None:
    assert "fingerprints" not in stream("none", mock_data=True).state_dict()


@pytest.mark.parametrize("found", [None, [], "x", {"a": 1}])
def test_state_whose_fingerprints_are_something_else_is_refused(
    tmp_path: Path, found: object
) -> None:
    drawn = stream(write(tmp_path / "a", ids_of(1)))
    state = {**state_after(drawn), "fingerprints": found}
    with pytest.raises(DataError, match=re.escape(f"data state has fingerprints {found!r}; there")):
        drawn.load_state_dict(state)


def test_file_of_a_phase_to_come_may_be_exchanged(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", ids_of(1)), write(tmp_path / "b", ids_of(2))
    phases = tuple(
        PhaseConfig(name=name, train_tokens=32, data_path=(prefix,))
        for name, prefix in (("first", a), ("second", b))
    )

    def run() -> SampleStream:
        cfg = DataConfig(phases=phases, num_workers=0)
        return build_data(cfg, vocab_size=500, seq_length=4, seed=1, samples_per_step=4).train

    to_come, begun = state_after(run(), 2), state_after(run(), 3)
    write(tmp_path / "b", ids_of(3))
    assert run().load_state_dict(to_come) == []
    with pytest.raises(DataError, match="source 'b' holds other tokens"):
        run().load_state_dict(begun)


def test_branch_goes_on_in_the_same_file_or_is_shuffled_anew(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", ids_of(1))
    state = state_after(stream(prefix))
    assert stream(prefix).inherit(state) == ["a: continues at sample 4"]
    write(tmp_path / "a", ids_of(2))
    with pytest.raises(
        DataError,
        match=r"^the run that is branched from had other data: source 'a' holds other tokens:"
        r" checkpoint \w{16}, this run \w{16}; a source that continues must be the same; restore"
        r" its token files, or shuffle anew with another --seed$",
    ):
        stream(prefix).inherit(state)
    branch = stream(prefix, seed=2)
    assert branch.inherit(state) == ["a: from its first sample"]
    # The branch is resumed by its own file, not by the one that the trunk had.
    again = stream(prefix, seed=2)
    assert again.load_state_dict(state_after(branch)) == []
