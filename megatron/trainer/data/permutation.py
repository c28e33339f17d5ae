"""Permutes a range pseudo-randomly without storing the order."""

import hashlib

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class KeyedPermutation:
    """Computes a pseudo-random permutation of range(n), element by element.

    A balanced Feistel network permutes the numbers of 2k bits, the smallest such range that holds
    n. A result outside range(n) is permuted again until it falls inside (cycle walking), which
    keeps the whole a bijection and takes fewer than four turns on average. Memory does not grow
    with n, and any position can be asked for first.

    Args:
        n: Size of the range, 1 to 2**62.
        key: Any integers and strings; another key is another order. (numpy's SeedSequence would not
            do: it takes (1,) and (1, 0) for one key.)

    Raises:
        ValueError: n is out of range.
    """

    def __init__(self, n: int, key: tuple[int | str, ...]) -> None:
        if not 1 <= n <= 2**62:
            raise ValueError(f"n is {n}; it must be 1 to 2**62")
        self.n = n
        half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8")  # [_ROUNDS]

    def __call__(self, i: int | npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Return where positions i go.

        Args:
            i: Positions, any shape, each 0 to n - 1.

        Returns:
            int64 array of i's shape, each element 0 to n - 1.

        Raises:
            IndexError: A position is outside range(n).
        """
        positions = np.asarray(i, dtype=np.int64)
        if positions.size and not (0 <= positions.min() and positions.max() < self.n):
            raise IndexError(f"positions must be 0 to {self.n - 1}, got {i}")
        values = self._permute(positions.astype(np.uint64).reshape(-1))
        outside = values >= self.n
        while outside.any():
            values[outside] = self._permute(values[outside])
            outside = values >= self.n
        return values.astype(np.int64).reshape(positions.shape)

    def _permute(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Apply the network once to 1-D values of 2k bits; uint64 wraps on purpose."""
        left, right = values >> self._half_bits, values & self._mask
        for round_key in self._round_keys:
            mixed = right + round_key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
            mixed ^= mixed >> np.uint64(31)
            left, right = right, left ^ (mixed & self._mask)
        return (left << self._half_bits) | right
