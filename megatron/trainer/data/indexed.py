"""Verifies and maps a token file: PREFIX.idx and PREFIX.bin in Megatron's indexed format.

The .bin holds the tokens of all documents end to end and nothing else; `index_file` has the layout
of the .idx.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.fingerprint import finish_fingerprint, start_fingerprint
from megatron.trainer.data.index_file import (
    REBUILD,
    DocumentStarts,
    IndexHeader,
    check_places,
    map_starts,
    read_blocks,
    read_header,
    sum_lengths,
)
from megatron.trainer.errors import DataError

_SCAN_TOKENS = 1 << 22
# Reading more at start, on every node, would delay a run by minutes and more.
_FULL_SCAN_TOKENS = 1 << 30


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """Describes the content of a token file."""

    dtype: str
    """How a token is stored."""
    num_documents: int
    """Documents in the index, empty ones included."""
    num_tokens: int
    """Tokens in all of them."""
    fingerprint: str
    """What tells it from another file of its size; see `fingerprint`."""


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """Holds a verified token file, mapped read-only."""

    prefix: str
    """Path without .bin and .idx."""
    tokens: npt.NDArray[np.integer]
    """[num_tokens] every token of the file, a memory map."""
    document_starts: DocumentStarts
    """Where documents begin, looked up in a memory map."""
    facts: TokenFacts
    """What the file's content is."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens in the file."""
        return int(self.tokens.shape[0])

    @property
    def num_documents(self) -> int:
        """Return the documents in the file."""
        return len(self.document_starts)

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """Return how a token is stored."""
        return self.tokens.dtype

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check every token against the vocabulary.

        Args:
            vocab_size: Token ids the model has an embedding for.

        Raises:
            DataError: A token is negative or not below vocab_size; names the first one.
        """
        info = np.iinfo(self.dtype)
        if info.min == 0 and info.max < vocab_size:
            return
        with open(f"{self.prefix}.bin", "rb") as file:
            blocks = read_blocks(file, self.dtype, self.num_tokens, block=_SCAN_TOKENS)
            for start, ids in blocks:
                check_ids(ids, vocab_size, file=file.name, first_token=start)


def check_ids(
    ids: npt.NDArray[np.integer], vocab_size: int, *, file: str, first_token: int
) -> None:
    """Check token ids against the vocabulary.

    Args:
        ids: [n] a stretch of a token file.
        vocab_size: Token ids the model has an embedding for.
        file: Its name, for the message.
        first_token: Position of ids[0] in the file.

    Raises:
        DataError: A token is negative or not below vocab_size; names the first one.
    """
    if int(ids.max()) < vocab_size and int(ids.min()) >= 0:
        return
    at = int(np.argmax((ids >= vocab_size) | (ids < 0)))
    raise DataError(
        f"{file}: token {first_token + at} has id {int(ids[at])}, but the vocabulary"
        f" has {vocab_size} ids; ids must be 0 to {vocab_size - 1}; preprocess the data"
        " with this model's tokenizer or raise --vocab-size"
    )


def open_tokens(
    prefix: str, *, vocab_size: int | None = None, verified: TokenFacts | None = None
) -> TokenFile:
    """Verify PREFIX.idx and PREFIX.bin against each other and map both.

    Takes memory that does not depend on the file's size.

    Args:
        prefix: Path without .bin and .idx.
        vocab_size: When given, every token must be below it. Files of up to 2^30 tokens are read
            through for this; larger ones are checked as they are drawn from (`WindowSource`).
        verified: What another process of this machine found in the very files, which are then not
            read through again: only their sizes and header are compared.

    Raises:
        DataError: A file is missing, empty, truncated, too long, of another format or inconsistent,
            or holds a token outside the vocabulary.
    """
    idx_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx_path, bin_path):
        _require_content(path, prefix)
    header = read_header(idx_path)
    if verified is not None:
        return _map_verified(prefix, header, verified)
    digest = start_fingerprint()
    num_tokens = sum_lengths(header, digest)
    tokens = _map_tokens(bin_path, header, num_tokens)
    check_places(header, digest)
    facts = TokenFacts(
        dtype=header.dtype.name,
        num_documents=header.num_documents,
        num_tokens=num_tokens,
        fingerprint=finish_fingerprint(digest, tokens),
    )
    starts = map_starts(header, num_tokens=num_tokens)
    file = TokenFile(prefix=prefix, tokens=tokens, document_starts=starts, facts=facts)
    if vocab_size is not None and num_tokens <= _FULL_SCAN_TOKENS:
        file.check_vocabulary(vocab_size)
    return file


def _map_verified(prefix: str, header: IndexHeader, verified: TokenFacts) -> TokenFile:
    """Map a token file that another process verified, if it can be that one.

    Raises:
        DataError: It is another one by now.
    """
    found = (header.dtype.name, header.num_documents)
    if found != (verified.dtype, verified.num_documents):
        raise DataError(
            f"{header.path} has {found[1]} documents in {found[0]} tokens, but when it was verified"
            f" it had {verified.num_documents} in {verified.dtype}; a file must not change while a"
            " run starts; wait until it is written, then start again"
        )
    return TokenFile(
        prefix=prefix,
        tokens=_map_tokens(Path(f"{prefix}.bin"), header, verified.num_tokens),
        document_starts=map_starts(header, num_tokens=verified.num_tokens),
        facts=verified,
    )


def _map_tokens(path: Path, header: IndexHeader, num_tokens: int) -> npt.NDArray[np.integer]:
    """Map the tokens of a .bin: [num_tokens].

    Raises:
        DataError: It is not as large as its index says.
    """
    itemsize = header.dtype.itemsize
    size = path.stat().st_size
    if size != num_tokens * itemsize:
        raise DataError(
            f"{path} has {size} bytes, but {header.path} describes {num_tokens} tokens of"
            f" {itemsize} bytes = {num_tokens * itemsize} bytes; both must agree; {REBUILD}"
        )
    return np.memmap(path, dtype=header.dtype, mode="r", shape=(num_tokens,))


def _require_content(path: Path, prefix: str) -> None:
    """Raise DataError unless path is a non-empty file."""
    if not path.is_file():
        raise DataError(
            f"{path} does not exist or is not a file; the prefix {prefix!r} must name two files,"
            " PREFIX.bin and PREFIX.idx; check the path, and give it without .bin or .idx"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} has 0 bytes; a token file must hold at least one token; {REBUILD}")
