"""Keeps keys and values of earlier tokens, so that generation computes each token once."""

import torch
from torch import Tensor


class KeyValueCache:
    """Holds keys and values of a batch whose rows may have different lengths.

    Before each pass over the model `place` says where its tokens stand. Each layer writes their
    keys and values there, and each token attends to its own position and those before it. A row's
    positions must be filled in order. What stands beyond a row's text, the padding of a first pass
    for example, is never looked at: it is overwritten before a token comes so far.

    Memory: layers x batch_size x capacity x 2 x ng x hn numbers of this rank.

    Args:
        batch_size: rows (b), at least 1.
        capacity: positions of a row, at least 1.
    """

    def __init__(self, *, batch_size: int, capacity: int) -> None:
        if batch_size < 1 or capacity < 1:
            raise ValueError(
                f"batch_size ({batch_size}) and capacity ({capacity}) of a key-value cache must be"
                " at least 1; use a positive number"
            )
        self.batch_size = batch_size
        self.capacity = capacity
        self.positions: Tensor | None = None
        self.visible: Tensor | None = None
        self.end = 0

    def place(self, position_ids: Tensor) -> None:
        """Sets where the tokens of the next pass stand.

        Args:
            position_ids: [b, n] int64, n consecutive positions of each row; the ids given to the
                model in that pass.

        Raises:
            ValueError: another number of rows, or a position outside the cache.
        """
        if position_ids.dim() != 2 or position_ids.shape[0] != self.batch_size:
            raise ValueError(
                f"position_ids are {list(position_ids.shape)}, but the cache has"
                f" {self.batch_size} rows; give [{self.batch_size}, n]"
            )
        first, last = int(position_ids.min()), int(position_ids.max())
        if first < 0 or last >= self.capacity:
            raise ValueError(
                f"position_ids go from {first} to {last}, but the cache holds 0 to"
                f" {self.capacity - 1}; make it with a larger capacity"
            )
        self.positions = position_ids
        self.end = last + 1
        width = position_ids.shape[1]
        places = torch.arange(self.end, device=position_ids.device)  # [end]
        # Rows that all begin at 0 see what a causal mask shows; so kernels may know it is one.
        is_start = self.end == width and bool((position_ids == places).all())
        self.visible = (
            None if is_start else places <= position_ids[:, None, :, None]
        )  # [b, 1, n, m]

    def new_layer(self) -> "LayerCache":
        """Creates the part of one attention layer."""
        return LayerCache(self)


class LayerCache:
    """Holds one attention layer's keys and values, each [b, ng, capacity, hn].

    Args:
        plan: says where each pass stands; shared by the layers.
    """

    def __init__(self, plan: KeyValueCache) -> None:
        self._plan = plan
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores the keys and values of new tokens.

        Args:
            key: [n, b, ng, hn] of the new tokens, after the rotary embedding.
            value: [n, b, ng, hn].

        Returns:
            key and value [m, b, ng, hn] of all positions up to the last one placed, and what the
            new tokens may look at: [b, 1, n, m] bool, or None where that is a causal mask.

        Raises:
            ValueError: these are not the tokens that `place` announced.
        """
        plan = self._plan
        if plan.positions is None or plan.positions.shape != (key.shape[1], key.shape[0]):
            announced = None if plan.positions is None else list(plan.positions.shape)
            raise ValueError(
                f"the pass has {key.shape[1]} rows of {key.shape[0]} tokens, but positions for"
                f" {announced} were placed; call place before each pass"
            )
        self._keys = self._store(self._keys, key)
        self._values = self._store(self._values, value)
        keys, values = (
            kept[:, :, : plan.end].permute(2, 0, 1, 3) for kept in (self._keys, self._values)
        )  # [m, b, ng, hn]
        return keys, values, plan.visible

    def _store(self, kept: Tensor | None, new: Tensor) -> Tensor:
        """Writes [n, b, ng, hn] to its places in [b, ng, capacity, hn]."""
        plan = self._plan
        _, rows, heads, size = new.shape
        if kept is None:
            # Zeros: a value that no token looks at has weight 0, but 0 x NaN would be NaN.
            kept = new.new_zeros(rows, heads, plan.capacity, size)
        row = torch.arange(rows, device=new.device)[:, None]  # [b, 1]
        kept[row, :, plan.positions] = new.transpose(0, 1)  # [b, n, ng, hn]
        return kept
