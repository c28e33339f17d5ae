"""Keeps memory for the temporaries of a loop over experts."""

from torch import Tensor

from moe_ext.layers.products import working_dtype, working_rows


class Scratch:
    """Lends the same memory to each expert's temporaries, one after the other.

    It stays in cache. The C library's does not: it seldom gives a freed block to the next request
    of the same size, because torch asks for aligned ones, so each temporary would be written to
    memory that was not used lately.

    Args:
        like: of the dtype and device.
        rows: the most that a temporary has.
    """

    def __init__(self, like: Tensor, rows: int) -> None:
        self._like, self._rows = like, rows
        self._kept: dict[str, Tensor] = {}
        self.dtype = like.dtype

    @classmethod
    def for_products(cls, source: Tensor, number: int) -> "Scratch":
        """Makes one of the dtype that rows of `source` are multiplied in.

        Args:
            source: [..., n].
            number: the most rows of an expert, before they are filled up.
        """
        like = source.new_empty(0, dtype=working_dtype(source))
        return cls(like, working_rows(number, like.dtype, like.device))

    def take(self, name: str, number: int, width: int) -> Tensor:
        """Returns the memory [number, width] of this name, with whatever was written there last.

        Args:
            name: of the temporary; two names have separate memory.
            number: rows, at most as many as there are.
            width: of a row, the same at each call.
        """
        kept = self._kept.get(name)
        if kept is None:
            kept = self._kept[name] = self._like.new_empty(self._rows, width)
        return kept[:number]

    def take_filled(self, name: str, number: int, width: int) -> tuple[Tensor, Tensor]:
        """Returns memory of `working_rows`, the last of them zeros, and its first `number` rows."""
        filled = self.take(name, working_rows(number, self.dtype, self._like.device), width)
        filled[number:].zero_()
        return filled, filled[:number]

    def fill(self, name: str, part: Tensor) -> Tensor:
        """Returns rows [n, width] converted and filled up with zeros; themselves if nothing is."""
        number = working_rows(len(part), self.dtype, self._like.device)
        if part.dtype == self.dtype and number == len(part):
            return part
        filled, rows = self.take_filled(name, len(part), part.shape[1])
        rows.copy_(part)
        return filled
