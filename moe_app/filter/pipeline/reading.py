"""Reads documents into a pipeline, replays what was decided on them, and writes those kept."""

import contextlib
from collections.abc import Iterable, Iterator

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import atomic_write
from moe_app.filter.pipeline.ledger import Ledger, read_verdicts
from moe_app.filter.records import BadEntry, Entry, json_line, read_entries

Documents = Iterable[Document]


class EntryReader(PipelineStep):
    """Reads the file of a task's number; counts and locates what is no document."""

    type = "READER"
    name = "documents"

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def run(
        self, data: Documents | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield the documents of one file.

        Raises:
            DataError: There are more bad lines than may be, or the file cannot be read.
        """
        plan = self.ledger.plan
        source = plan.sources[rank]
        for entry in read_entries(source, text_key=plan.text_key):
            if isinstance(entry, BadEntry):
                self.ledger.add_bad(entry)
                continue
            self.ledger.documents += 1
            yield Document(
                text=entry.text, id=f"{source.path}:{entry.line}", metadata={"entry": entry}
            )


class VerdictReplay(PipelineStep):
    """Takes out the documents that earlier readings dropped."""

    type = "FILTER"
    name = "verdicts of earlier readings"

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def run(self, data: Documents | None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents that are still there."""
        verdicts = read_verdicts(self.ledger.folder, readings=self.ledger.number, file=rank)
        for document in data or ():
            found = verdicts.get(document.metadata["entry"].line)
            if found is None:
                yield document
            elif self.ledger.is_last:
                document.metadata["dropped"] = found
                self.ledger.write(document, rank)


class KeptWriter(PipelineStep):
    """Writes what is left; the last step of the last reading."""

    type = "WRITER"
    name = "kept documents"

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def run(self, data: Documents | None, rank: int = 0, world_size: int = 1) -> None:
        """Write the file's outputs; they appear only when they are complete."""
        ledger = self.ledger
        path = ledger.folder.kept / f"{ledger.plan.sources[rank].name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with ledger_of(ledger, rank), atomic_write(path) as file:
            for document in data or ():
                file.write(kept_line(document, text_key=ledger.plan.text_key))
                ledger.kept += 1


@contextlib.contextmanager
def ledger_of(ledger: Ledger, rank: int) -> Iterator[None]:
    """Keep the ledger of one file open; commit it when all went well."""
    ledger.begin(rank)
    try:
        yield
        ledger.commit(rank)
    except BaseException:
        ledger.discard()
        raise


def kept_line(document: Document, *, text_key: str) -> bytes:
    """Return the line of a kept document: the one it was read from, unless its text changed."""
    entry: Entry = document.metadata["entry"]
    if document.text != entry.text:
        return json_line(entry.value | {text_key: document.text})
    if entry.raw is None:
        try:
            return json_line(entry.value)
        except DataError as error:
            raise DataError(f"{document.id}: {error}") from error
    return entry.raw if entry.raw.endswith(b"\n") else entry.raw + b"\n"
