"""Checks that keeping documents apart will do something in a source, by what its index says.

Documents end where the .idx says. Whether that is true of the text shows in the id that ends a
document: it should be every document's last token and stand nowhere else. Of huge files this is
looked up in a sample.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.index_file import DocumentStarts
from megatron.trainer.data.source import WindowSource
from megatron.trainer.errors import DataError

_NUM_SAMPLED = 512
_TAIL_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class DocumentEnds:
    """Counts what the documents of a source end with, in a sample of them."""

    num_sampled: int
    """Documents that were looked at, evenly spaced over the source: at most 512."""
    num_ended: int
    """Those whose last token is the id."""
    num_inside: int
    """Those that hold it between their first token, which may be the same one, and their last; of
    long ones the last 2,048 tokens count."""
    common: tuple[int, int]
    """The last token that most of them have, and how many."""


def look_at_ends(source: WindowSource, eod: int) -> DocumentEnds:
    """Count how often `eod` ends the documents of a source, and how often it stands inside.

    Reading a document's end takes a page or two of the file, whatever its size.
    """
    tails = _tails(source)
    last = np.array([tail[-1] for tail in tails], dtype=np.int64)
    ids, counts = np.unique(last, return_counts=True)
    most = int(np.argmax(counts))
    return DocumentEnds(
        num_sampled=len(tails),
        num_ended=int((last == eod).sum()),
        num_inside=sum(bool((tail[1:-1] == eod).any()) for tail in tails),
        common=(int(ids[most]), int(counts[most])),
    )


def check_ends(
    source: WindowSource, *, eod: int | None, is_given: bool, is_training: bool
) -> list[str]:
    """Check that keeping the documents of a source apart does what was asked for.

    Args:
        source: Read with the starts of its documents.
        eod: The id that ends a document; None where none is known.
        is_given: It was given by --eod-token-id; otherwise it is the tokenizer's, which files
            written without --append-eod do not hold.
        is_training: The source is trained on.

    Returns:
        What is worth a line in the log.

    Raises:
        DataError: There is nothing to keep apart, or the id contradicts the index.
    """
    starts, documents = _documents(source)
    count = len(documents)
    is_single = starts.bound(documents[0]) == starts.bound(documents[-1])
    is_whole_file = (source.start_token, source.stop_token) == (0, len(source.tokens))
    if is_single and is_training and is_whole_file:
        raise DataError(
            f"source {source.name!r} is one document of {source.num_tokens} tokens by"
            f" {source.prefix}.idx, so --reset-position-ids and --reset-attention-mask would change"
            " nothing in it; they keep documents apart where the index says that they end; write"
            " it again with one document a line of input, leave it out, or drop the two flags"
        )
    notes = [f"{source.name} is one document, with nothing to keep apart"] if is_single else []
    if eod is not None:
        found = look_at_ends(source, eod)
        where = f"of {found.num_sampled} documents looked at, of {count} in {source.prefix}.idx"
        said = f"{found.num_ended} end with it and {found.num_inside} hold it before their end"
        if found.num_ended < found.num_sampled or found.num_inside:
            if is_given:
                _refuse_given(source, eod, found, f"{where}, {said}")
            if found.num_inside and (is_single or found.num_ended < found.num_sampled):
                _refuse_tokenizers(source, eod, f"{where}, {said}")
            notes.append(
                f"{source.name}: the tokenizer ends documents with id {eod}; {where}, {said};"
                " they are kept apart where the index says that they end"
            )
    return notes


def _refuse_given(source: WindowSource, eod: int, found: DocumentEnds, said: str) -> None:
    raise DataError(
        f"--eod-token-id {eod} is not what ends documents in source {source.name!r}: {said} (the"
        f" most frequent last token is {found.common[0]}, {found.common[1]} times); it must be the"
        " last token of every document and stand nowhere else; give the id that is, or none:"
        " documents are kept apart where the index says that they end"
    )


def _refuse_tokenizers(source: WindowSource, eod: int, said: str) -> None:
    raise DataError(
        f"the tokenizer ends documents with id {eod}, which contradicts the index of source"
        f" {source.name!r}: {said}; documents are kept apart where the index says that they end,"
        " and must end there in the text, too; write the file again with one document a line of"
        " input, or give the --tokenizer-model that it was written with"
    )


def _tails(source: WindowSource) -> list[npt.NDArray[np.integer]]:
    """Return the last tokens of documents evenly spaced over a source; none of empty ones."""
    starts, documents = _documents(source)
    count = len(documents)
    chosen = np.linspace(0, count - 1, min(count, _NUM_SAMPLED)).astype(np.int64)
    # Empty documents begin where the next one does that is not empty, which stands for them.
    begins = dict.fromkeys(starts.bound(documents[n]) for n in chosen.tolist())
    tails = []
    for first in begins:
        stop = min(source.stop_token, starts.bound(starts.first_from(first + 1)))
        tails.append(np.asarray(source.tokens[max(first, stop - _TAIL_TOKENS) : stop]))
    return tails


def _documents(source: WindowSource) -> tuple[DocumentStarts, range]:
    """Return where the file's documents begin, and the numbers of the source's."""
    starts = source.document_starts
    assert starts is not None, "the source must be read with its documents"
    bounds = (starts.first_from(token) for token in (source.start_token, source.stop_token))
    return starts, range(*bounds)
