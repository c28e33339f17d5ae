"""Makes micro-batches of tokenized texts: a source of samples for the trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron.trainer.data.batch import Batch, find_borders
from megatron.trainer.data.permutation import KeyedPermutation
from megatron.trainer.errors import DataError
from moe_app.chat.chat_cache import TokenizerChoice, open_tokens_of
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.chat.dialogue import ChatKind
from moe_app.chat.packing import Packs, one_each, pack
from moe_app.chat.token_store import TokenStore

_MISMATCHED = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSource:
    """Serves the texts of a store: a `RowSource` of the trainer.

    A unit is what belongs together: a conversation, a pair, or a judged text with its mismatched
    one. Packed, a sample is one row of whole units; else a sample is one unit with a row for each
    of its texts.
    """

    name: str
    """Name in tables, metrics and checkpoints."""
    store: TokenStore
    """The texts."""
    kind: ChatKind
    """What they are."""
    packs: Packs
    """Which units are in which sample."""
    is_packed: bool
    """Whether a sample is one row."""
    seq_length: int
    """Positions in a row (s)."""
    seed: int
    """With epoch and name, the key of the order."""
    number: int = 0
    """Tells its texts from those of other sources, in `texts["set"]`."""

    @property
    def num_windows(self) -> int:
        """Return the samples in an epoch."""
        return len(self.packs[0]) - 1

    @property
    def num_tokens(self) -> int:
        """Return the tokens in an epoch, without padding."""
        return len(self.store.tokens)

    @property
    def num_documents(self) -> int:
        """Return the texts in an epoch."""
        return self.store.num_texts

    @property
    def fingerprint(self) -> str:
        """Return what tells the texts from others; how they share rows is part of it."""
        return f"{self.store.fingerprint}{'-packed' * self.is_packed}"

    def windows_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number in the data of each sample; samples [m] count over all epochs."""
        found = np.empty_like(samples)
        epochs, places = np.divmod(samples, self.num_windows)
        for epoch in np.unique(epochs).tolist():
            order = KeyedPermutation(self.num_windows, (self.seed, epoch, self.name))
            found[epochs == epoch] = order(places[epochs == epoch])
        return found

    def read_window(self, n: int) -> npt.NDArray[np.integer]:
        """Texts are no windows; the trainer asks for rows."""
        raise TypeError("a source of texts has rows, not windows")

    def read_starts(self, n: int) -> npt.NDArray[np.int64] | None:
        """Texts are no windows; the trainer asks for rows."""
        raise TypeError("a source of texts has rows, not windows")

    def read_rows(self, numbers: Sequence[int], *, pin_memory: bool) -> Batch:
        """Return a micro-batch of samples; see `RowSource`."""
        rows: list[list[int]] = []
        members: list[tuple[int, int, int]] = []  # text, its unit, its role
        for number in numbers:
            texts = [each for unit in self._units(number) for each in self._texts(unit)]
            if self.is_packed:
                rows.append(list(range(len(members), len(members) + len(texts))))
            else:
                rows += [[len(members) + i] for i in range(len(texts))]
            members += texts
        batch = self._fill(rows, members)
        return _pinned(batch) if pin_memory else batch

    def _units(self, number: int) -> list[int]:
        """Return the units of a sample."""
        begins, units = self.packs
        found: list[int] = units[begins[number] : begins[number + 1]].tolist()
        return found

    def _texts(self, unit: int) -> list[tuple[int, int, int]]:
        """Return number, unit and role of each text of a unit."""
        if self.kind == "sft":
            return [(unit, unit, 1)]
        if self.kind == "preference":
            return [(2 * unit, unit, 0), (2 * unit + 1, unit, 1)]
        judgement = int(self.store.labels[unit])
        mismatched = self.store.num_texts // 2 + unit
        return [(unit, unit, judgement), (mismatched, unit, _MISMATCHED)]

    def _fill(
        self, rows: Sequence[Sequence[int]], members: Sequence[tuple[int, int, int]]
    ) -> Batch:
        """Write texts into rows, one after the other, and pad each row at its end."""
        shape = (len(rows), self.seq_length)
        tokens, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        mask, starts = np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
        segments, padding = np.full(shape, -1, np.int64), np.ones(shape, np.bool_)
        for row, texts in enumerate(rows):
            begin = 0
            for segment in texts:
                ids, counted = self.store.read(members[segment][0])
                end = begin + len(ids)
                starts[row, begin] = begin > 0
                tokens[row, begin:end] = ids
                padding[row, begin:end] = False
                # The last token of a text has no label.
                labels[row, begin : end - 1] = ids[1:]
                mask[row, begin : end - 1] = counted[1:]
                segments[row, begin : end - 1] = segment
                begin = end
            if begin < self.seq_length:
                starts[row, begin] = begin > 0
        places = np.arange(self.seq_length, dtype=np.int64)[None]
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            loss_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(places),
            document_starts=torch.from_numpy(starts),
            borders=find_borders(starts),
            segments=torch.from_numpy(segments),
            padding=torch.from_numpy(padding),
            texts={
                "index": torch.tensor([unit for _, unit, _ in members]),
                "role": torch.tensor([role for _, _, role in members]),
                "set": torch.full((len(members),), self.number),
            },
        )


def open_chat_data(
    cfg: ChatDataConfig,
    kind: ChatKind,
    *,
    files: Sequence[str],
    name: str,
    tokenizer: TokenizerChoice,
    seq_length: int,
    seed: int,
    number: int = 0,
) -> TextSource:
    """Open texts as a source of samples; tokenize them where nobody has.

    Args:
        cfg: how rows become texts.
        kind: what rows hold.
        files: what is read.
        name: of the source, and of its flag: `train` or `valid`.
        tokenizer: makes tokens of them.
        seq_length: positions in a row.
        seed: of the order.
        number: of the source.

    Raises:
        UserError: files, rows or settings are not as they must be.
    """
    store = open_tokens_of(
        files, kind, cfg, tokenizer, seq_length=seq_length, flag=f"--{name}-data"
    )
    is_packed = cfg.has_packing(kind)
    return TextSource(
        name=name,
        store=store,
        kind=kind,
        packs=_packs(store, kind, seq_length, is_packed=is_packed),
        is_packed=is_packed,
        seq_length=seq_length,
        seed=seed,
        number=number,
    )


def _packs(store: TokenStore, kind: ChatKind, seq_length: int, *, is_packed: bool) -> Packs:
    """Say which units share a sample.

    Raises:
        DataError: the texts of a unit do not fit into one row.
    """
    lengths = store.lengths
    if kind == "preference":
        sizes = lengths[0::2] + lengths[1::2]
    elif kind == "kto":
        half = len(lengths) // 2
        sizes = lengths[:half] + lengths[half:]
    else:
        sizes = lengths
    if not is_packed:
        return one_each(len(sizes))
    if sizes.max() > seq_length:
        raise DataError(
            f"row {int(sizes.argmax()) + 1} has two texts of {int(sizes.max())} tokens together,"
            f" more than --seq-length {seq_length}; packed, both are in one sequence; raise it to"
            " twice the longest text, or use --no-packing"
        )
    return pack(sizes, seq_length)


def _pinned(batch: Batch) -> Batch:
    """Return the batch in page-locked memory."""
    tensors = {name: each for name, each in vars(batch).items() if isinstance(each, Tensor)}
    pinned: dict[str, Any] = {name: each.pin_memory() for name, each in tensors.items()}
    texts = {name: each.pin_memory() for name, each in batch.texts.items()}
    return replace(batch, **pinned, texts=texts)
