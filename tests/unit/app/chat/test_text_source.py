"""Compares micro-batches of texts with the texts, and packed training with each text alone."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron.trainer.data.batch import Batch
from megatron.trainer.data.batch_views import DocumentRule, separate_documents
from megatron.trainer.data.sampler import Phase
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.errors import DataError
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.state import TrainState
from moe_app.chat.chat_cache import TokenizerChoice
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.chat.dialogue import ChatKind
from moe_app.chat.text_source import TextSource, open_chat_data
from moe_app.pretrain.build import build_chunks
from moe_app.pretrain.config import parse_recipe
from tests.distributed.launcher import flags
from tests.unit.app.chat.make_chat import make_tokenizer, write_rows

S = 96
WORDS = [f"{'over ' * n}dog" for n in (1, 7, 3, 2, 9, 4, 6, 5)]
ROWS: dict[ChatKind, list[dict[str, Any]]] = {
    "sft": [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": word}]}
        for word in WORDS
    ],
    "preference": [
        {"prompt": "q", "chosen": a, "rejected": b}
        for a, b in itertools.pairwise(word[:12] for word in WORDS)
        if a != b
    ],
    "kto": [
        {"prompt": str(n), "completion": word[-7:], "label": n % 3 > 0}
        for n, word in enumerate(WORDS)
    ],
}


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., TextSource]:
    """Opens the rows of a kind."""
    make_tokenizer(tmp_path / "tokenizer")
    choice = TokenizerChoice(
        tokenizer_type="HFTokenizer", tokenizer_model=str(tmp_path / "tokenizer")
    )

    def open_kind(kind: ChatKind, *, packing: bool, length: int = S) -> TextSource:
        return open_chat_data(
            ChatDataConfig(packing=packing),
            kind,
            files=[write_rows(tmp_path / f"{kind}.jsonl", ROWS[kind])],
            name="train",
            tokenizer=choice,
            seq_length=length,
            seed=3,
        )

    return open_kind


def texts_of(batch: Batch) -> list[tuple[int, int, list[int], list[int]]]:
    """Cut a micro-batch at its documents: index, role, tokens and counted labels of each text."""
    found = {}
    assert batch.document_starts is not None and batch.segments is not None
    for row in range(len(batch.tokens)):
        cuts = [0, *torch.nonzero(batch.document_starts[row])[:, 0].tolist(), S]
        for begin, end in itertools.pairwise(cuts):
            segments = batch.segments[row, begin:end]
            if segments.max() < 0:  # padding
                assert end == S and not batch.loss_mask[row, begin:end].any()
                continue
            text = int(segments[0])
            # All but the last position have a label of their text.
            assert segments.tolist() == [text] * (end - begin - 1) + [-1]
            tokens, labels = batch.tokens[row, begin:end], batch.labels[row, begin:end]
            assert labels[:-1].tolist() == tokens[1:].tolist()
            is_counted = batch.loss_mask[row, begin:end] == 1
            assert not is_counted[-1]
            index, role = (int(batch.texts[name][text]) for name in ("index", "role"))
            found[text] = index, role, tokens.tolist(), labels[is_counted].tolist()
    assert sorted(found) == list(range(len(batch.texts["index"])))
    return [found[text] for text in range(len(found))]


def stored(source: TextSource) -> list[tuple[int, int, list[int], list[int]]]:
    """The same of every text, in the order of the data."""
    units = len(ROWS[source.kind])
    found = []
    for unit, row in enumerate(ROWS[source.kind]):
        numbers = {
            "sft": [(unit, 1)],
            "preference": [(2 * unit, 0), (2 * unit + 1, 1)],
            "kto": [(unit, int(row.get("label", 0))), (units + unit, 2)],
        }[source.kind]
        for number, role in numbers:
            ids, counted = source.store.read(number)
            found.append((unit, role, ids.tolist(), ids[counted == 1].tolist()))
    return found


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_hold_every_text_once_and_apart(
    kind: ChatKind, packing: bool, opened: Callable[..., TextSource]
) -> None:
    source = opened(kind, packing=packing)
    batch = source.read_rows(range(source.num_windows), pin_memory=False)
    found = texts_of(batch)
    expected = stored(source)
    assert sorted(found) == sorted(expected)
    if kind != "sft":  # a pair's two are neighbours, the first of them as documented
        firsts = [index for index, *_ in found[::2]]
        assert firsts == [index for index, *_ in found[1::2]]
        assert [role for _, role, *_ in found[1::2]] == [1 if kind == "preference" else 2] * len(
            firsts
        )
    if packing:
        assert len(batch.tokens) == source.num_windows < len(expected)
    else:
        assert len(batch.tokens) == len(expected)
        assert found == expected


def test_pair_that_does_not_fit_one_sequence_is_named(opened: Callable[..., TextSource]) -> None:
    longest = int(opened("preference", packing=False).store.lengths.max())
    with pytest.raises(DataError, match=r"has two texts of .* use --no-packing"):
        opened("preference", packing=True, length=longest)
    assert opened("preference", packing=False, length=longest).num_windows == 3


@pytest.mark.parametrize("is_varlen", [False, True])
def test_packed_and_padded_train_like_each_text_alone(
    is_varlen: bool,
    opened: Callable[..., TextSource],
    make_state: Callable[..., TrainState],
) -> None:
    alone = {"moe-aux-loss-coeff": 0, "moe-z-loss-coeff": 0, "vocab-size": 512, "seq-length": S}
    state = make_state(**alone)
    cfg = parse_recipe(flags(device="cpu", **alone), prog="test", description="")
    rule = DocumentRule(
        eod=None, reset_position_ids=True, reset_attention_mask=True, is_varlen=is_varlen
    )

    def gradients(losses: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        losses.sum().backward()
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    model = build_chunks(cfg, state.ctx, seed=1).chunks[0]
    sources = [opened("sft", packing=packing) for packing in (False, True)]
    parts: list[torch.Tensor] = []
    for _, _, ids, _ in stored(sources[0]):
        number = len(parts)
        counted = torch.from_numpy(sources[0].store.read(number)[1].astype(np.bool_))
        tokens = torch.tensor(ids)
        logits = model(tokens[None, :-1], torch.arange(len(ids) - 1)[None], None)[0]  # [s, v]
        parts.append(F.cross_entropy(logits, tokens[1:], reduction="none")[counted[1:]])
    truth = torch.cat(parts)
    expected = gradients(truth, model)
    assert len(expected) > 10
    for source in sources:
        batch = source.read_rows(range(source.num_windows), pin_memory=False)
        whole = separate_documents(batch, rule)
        losses, _ = NEXT_TOKEN.forward(iter([whole]), model)
        counted_losses = losses[whole.loss_mask == 1]
        assert counted_losses.sum().item() == pytest.approx(truth.sum().item(), rel=1e-6)
        for found, wanted in zip(gradients(counted_losses, model), expected, strict=True):
            # fp32: sums of some hundred terms in another order.
            distance = torch.linalg.vector_norm(found - wanted)
            assert distance <= 1e-4 * torch.linalg.vector_norm(wanted)


def test_order_continues_and_is_that_of_every_number_of_ranks(
    opened: Callable[..., TextSource],
) -> None:
    source = opened("sft", packing=False)

    def stream() -> SampleStream:
        phase = Phase(sources=(source.name,), weights=(1.0,))
        return SampleStream([source], [phase], seq_length=S, seed=3)

    def step(of: SampleStream, rank: int = 0, size: int = 1) -> list[list[int]]:
        batches = of.next_global_batch(
            global_batch_size=4,
            micro_batch_size=1,
            data_parallel_rank=rank,
            data_parallel_size=size,
        )
        return [batch.texts["index"].tolist() for batch in batches]

    whole = stream()
    steps = [step(whole) for _ in range(4)]
    epochs = [[n for each in steps[at : at + 2] for (n,) in each] for at in (0, 2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 2
    assert epochs[0] != epochs[1] and epochs[0] != list(range(8))
    first = stream()
    step(first)
    resumed = stream()
    resumed.load_state_dict(first.state_dict())
    assert [step(resumed) for _ in range(3)] == steps[1:]
    ranks = [stream(), stream()]
    for expected in steps:
        halves = [step(each, rank, 2) for rank, each in enumerate(ranks)]
        assert [each for pair in zip(*halves, strict=True) for each in pair] == expected


def test_other_texts_are_refused_by_a_resumed_run(
    opened: Callable[..., TextSource], tmp_path: Path
) -> None:
    def stream(source: TextSource) -> SampleStream:
        phase = Phase(sources=(source.name,), weights=(1.0,))
        return SampleStream([source], [phase], seq_length=S, seed=3)

    before = stream(opened("sft", packing=False))
    before.next_global_batch(
        global_batch_size=1, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1
    )
    ROWS["sft"][0], ROWS["sft"][1] = ROWS["sft"][1], ROWS["sft"][0]
    try:
        after = stream(opened("sft", packing=False))
    finally:
        ROWS["sft"][0], ROWS["sft"][1] = ROWS["sft"][1], ROWS["sft"][0]
    with pytest.raises(DataError, match="holds other tokens"):
        after.load_state_dict(before.state_dict())
