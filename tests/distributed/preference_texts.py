"""Make a few tokenized texts in memory, for tests of objectives."""

from pathlib import Path

import numpy as np

from moe_app.chat.dialogue import ChatKind
from moe_app.chat.packing import one_each, pack
from moe_app.chat.text_source import TextSource
from moe_app.chat.token_store import TokenStore

LABELS = (True, True, False, True)
"""Of the judged texts; a data parallel rank may see none that is undesirable."""
LENGTHS = ((4, 3), (6, 5), (3, 6), (5, 2))
"""Tokens of each pair's answers."""
VOCAB = 120
SEQUENCE = 48

Text = tuple[list[int], list[int]]
"""Prompt and answer."""


def pairs() -> list[tuple[Text, Text]]:
    """Return (chosen, rejected) of each pair; both begin with the same prompt."""
    generator = np.random.default_rng(33)

    def ids(count: int) -> list[int]:
        drawn: list[int] = generator.integers(1, VOCAB, count).tolist()
        return drawn

    found = []
    for number, (chosen, rejected) in enumerate(LENGTHS):
        prompt = ids(3 + number % 2)
        found.append(((prompt, ids(chosen)), (prompt, ids(rejected))))
    return found


def mismatched() -> list[Text]:
    """Return for each judged text one with its prompt and the next text's answer."""
    own = [chosen for chosen, _ in pairs()]
    return [(prompt, own[(i + 1) % len(own)][1]) for i, (prompt, _) in enumerate(own)]


def texts_of(kind: ChatKind) -> list[Text]:
    """Return the texts in the order of a store."""
    if kind == "preference":
        return [text for pair in pairs() for text in pair]
    chosen = [text for text, _ in pairs()]
    return chosen if kind == "sft" else chosen + mismatched()


def source_of(kind: ChatKind, *, is_packed: bool) -> TextSource:
    """Return a source of the texts of a kind; packed, they share two rows."""
    texts = texts_of(kind)
    ids = [prompt + answer for prompt, answer in texts]
    counted = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in texts]
    store = TokenStore(
        path=Path("memory"),
        tokens=np.concatenate(ids).astype(np.int32),
        counted=np.concatenate(counted).astype(np.uint8),
        ends=np.cumsum([len(each) for each in ids]),
        labels=np.array(LABELS if kind == "kto" else (), np.uint8),
        facts={},
        fingerprint="memory",
    )
    lengths = store.lengths
    half = len(lengths) // 2
    sizes = {
        "sft": lengths,
        "preference": lengths[0::2] + lengths[1::2],
        "kto": lengths[:half] + lengths[half:],
    }[kind]
    # A capacity below the row's length, so that padding follows the last text of each row.
    packs = pack(sizes, int(sizes.sum()) // 2 + 4) if is_packed else one_each(len(sizes))
    source = TextSource(
        name="train",
        store=store,
        kind=kind,
        packs=packs,
        is_packed=is_packed,
        seq_length=SEQUENCE,
        seed=3,
    )
    assert source.num_windows == (2 if is_packed else 4)
    return source
