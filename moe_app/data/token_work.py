"""Writes the token file of one key, or one shard of it, from where an earlier start ended."""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.trainer.data.text_input import TextInput
from megatron.trainer.data.token_draft import TokenDraft
from megatron.trainer.data.token_manifest import (
    TokenizerIdentity,
    TokenManifest,
    manifest_path,
    read_manifest,
)
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import DataError, printable
from moe_app.data.encoding import Encoded, encoded_chunks
from moe_app.data.progress import ReadProgress
from moe_app.data.shards import shard_prefix, written_facts
from moe_app.data.text_chunks import Chunk, Position, read_chunks
from moe_app.data.text_inputs import Input, Segment, count_lines

_COMMIT_SECONDS = 15.0
_MOST_LISTED = 20
_COUNTED = (
    "num_lines",
    "num_blank_lines",
    "num_bad_lines",
    "num_empty_documents",
    "num_documents",
    "num_tokens",
    "num_text_bytes",
)


@dataclass(frozen=True, kw_only=True)
class TokenWork:
    """Describes a token file to write, or one shard of it."""

    args: argparse.Namespace
    """The command line."""
    key: str
    """Where in an object the text is."""
    inputs: Sequence[Input]
    segments: Sequence[Segment]
    """What is read of them."""
    inputs_sha256: str
    """What tells the inputs of all shards from others."""
    num_inputs: int
    """Of all shards."""
    texts: Mapping[int, TextInput]
    """Those that are not plain, by their place; each may be read once a key."""
    tokenizer: Tokenizer
    identity: TokenizerIdentity

    @property
    def prefix(self) -> str:
        """Return the path without .bin and .idx."""
        whole = f"{self.args.output_prefix}_{self.args.output_key or self.key}_document"
        return shard_prefix(whole, index=self.args.shard_index, count=self.args.num_shards)

    @property
    def is_resumable(self) -> bool:
        """Return whether all inputs can be read again."""
        return all(each.num_bytes is not None for each in self.inputs)

    def deciding(self) -> dict[str, Any]:
        """Return what decides the content of all shards together."""
        return {
            "key": self.key,
            "tokenizer": self.identity.sha256,
            "tokenizer_type": self.identity.kind,
            "vocabulary": self.tokenizer.vocab_size,
            "control_tokens": digest(self.tokenizer.control_texts()),
            "first_tokens": list(self.tokenizer.prefix),
            "last_token": self.tokenizer.eod if self.args.append_eod else None,
            "inputs": self.inputs_sha256,
        }

    def begun(self) -> dict[str, Any]:
        """Return what an unfinished start must have begun with to go on."""
        return self.deciding() | {
            "input_times": digest([each.modified_ns for each in self.inputs]),
            "shard": [self.args.shard_index, self.args.num_shards],
        }

    def described(self) -> dict[str, Any]:
        """Return the fields of the manifest that are known beforehand."""
        return {
            "tokenizer_type": self.identity.kind,
            "tokenizer_file": self.identity.path.name,
            "tokenizer_sha256": self.identity.sha256,
            "vocab_size": self.tokenizer.vocab_size,
            "eod_token_id": self.tokenizer.eod if self.args.append_eod else None,
            "num_input_files": self.num_inputs,
            "work_sha256": digest(self.deciding()),
            "num_shards": self.args.num_shards,
            "shard_index": self.args.shard_index,
        }

    def written(self) -> TokenManifest | None:
        """Return the manifest of what an earlier start finished; None where it must be written.

        Raises:
            DataError: Where the manifest belongs is a file that is none.
        """
        manifest = read_manifest(self.prefix)
        return manifest if manifest is not None and self.missing(manifest) is None else None

    def missing(self, manifest: TokenManifest) -> str | None:
        """Return why files with this manifest are not what is to be written; None if they are."""
        if not self.is_resumable:
            return "an input is a pipe"
        mine = self.described()
        differing = [name for name, value in mine.items() if getattr(manifest, name) != value]
        if differing:
            return (
                "it was written by another command or of other inputs: its manifest differs in"
                f" {', '.join(differing)}"
            )
        when = manifest_path(self.prefix).stat().st_mtime_ns
        newer = [each.path for each in self.inputs if (each.modified_ns or 0) > when]
        if newer:
            return f"{newer[0]} was changed after it was written"
        try:
            is_whole = written_facts(self.prefix, manifest) == manifest.facts
        except DataError as error:
            return str(error)
        return None if is_whole else "its files are not those of its manifest"


def digest(value: object) -> str:
    """Return the SHA-256 of a value of JSON's types."""
    return hashlib.sha256(json.dumps(value).encode("ascii")).hexdigest()


class TokenRun:
    """Takes what is encoded, in order, and keeps the counts.

    Args:
        work: What is written.
        draft: Where to.
    """

    def __init__(self, work: TokenWork, draft: TokenDraft) -> None:
        self._work = work
        self._segments = segments = work.segments
        self._draft = draft
        progress = draft.progress
        self._counts = [Counter(each) for each in progress.get("counts", ())]
        self._problems: list[str] = list(progress.get("problems", ()))
        self._earlier_lines: dict[int, int] = {}
        self._committed = time.monotonic()
        first = segments[0].start if segments else 0
        self.position = Position(*progress.get("position", (0, first)))
        self.begun_tokens = draft.num_tokens
        self.begun_documents = draft.num_documents

    @property
    def totals(self) -> Counter[str]:
        """Return the counts of all inputs."""
        return sum(self._counts, Counter(dict.fromkeys(_COUNTED, 0)))

    @property
    def problems(self) -> list[str]:
        """Return the first bad lines, with their places."""
        return self._problems

    def take(self, chunk: Chunk, encoded: Encoded) -> None:
        """Write what a chunk became, and commit now and then.

        Raises:
            DataError: There are more bad lines than may be, or it cannot be written.
        """
        while len(self._counts) <= chunk.segment:
            self._counts.append(Counter())
        counts = self._counts[chunk.segment]
        self._note_bad(chunk, encoded)
        counts.update({name: getattr(encoded, name, 0) for name in _COUNTED})
        counts["num_documents"] += encoded.lengths.size
        counts["num_tokens"] += encoded.ids.size
        self._draft.append(encoded.ids, encoded.lengths)
        self.position = Position(chunk.segment, chunk.stop)
        is_due = time.monotonic() - self._committed >= _COMMIT_SECONDS
        if is_due and self._work.is_resumable and not chunk.is_cut:
            self._draft.commit(self._progress())
            self._committed = time.monotonic()

    def complete(self) -> None:
        """Commit that all is written.

        Raises:
            DataError: There is not one document, which no token file can say; a shard may be empty.
        """
        args, totals = self._work.args, self.totals
        if not self._draft.num_documents and args.num_shards == 1:
            raise DataError(
                f"{' '.join(args.input)}: 0 documents with text under {self._work.key!r},"
                f" {totals['num_empty_documents']} without; there must be at least one; check"
                " --input and --json-keys"
            )
        self._draft.commit(self._progress(), is_written=True)

    def described(self) -> dict[str, Any]:
        """Return the fields of the manifest, without those of TokenFacts."""
        totals = self.totals
        sources = [
            {
                "path": self._work.inputs[segment.source].path,
                "num_bytes": self._work.inputs[segment.source].num_bytes,
                **{name: counts[name] for name in _COUNTED},
            }
            for segment, counts in zip(self._segments, self._padded(), strict=True)
        ]
        return self._work.described() | {
            "num_text_bytes": totals["num_text_bytes"],
            "num_empty_documents": totals["num_empty_documents"],
            "num_bad_lines": totals["num_bad_lines"],
            "sources": tuple(sources),
        }

    def _padded(self) -> list[Counter[str]]:
        return self._counts + [Counter()] * (len(self._segments) - len(self._counts))

    def _progress(self) -> dict[str, Any]:
        return {
            "position": [self.position.segment, self.position.offset],
            "counts": self._counts,
            "problems": self._problems,
        }

    def _note_bad(self, chunk: Chunk, encoded: Encoded) -> None:
        """Keep the places of the first bad lines, and refuse too many."""
        if not encoded.num_bad_lines:
            return
        before = self.totals["num_bad_lines"]
        most = self._work.args.max_bad_lines
        earlier = self._lines_before(chunk.segment)
        found = [
            f"{chunk.name}, line {earlier + number}{problem}"
            for number, problem in sorted(encoded.problems)
        ]
        self._problems += found[: _MOST_LISTED - len(self._problems)]
        if before + encoded.num_bad_lines > most:
            problem = found[min(most - before, len(found) - 1)]
            raise DataError(
                f"{problem} (--max-bad-lines is {most}: raise it to skip and count such lines)"
            )

    def _lines_before(self, segment: int) -> int:
        """Return the lines of an input before the next chunk."""
        here = self._segments[segment]
        if segment not in self._earlier_lines:
            path = self._work.inputs[here.source].path
            self._earlier_lines[segment] = count_lines(path, here.start) if here.start else 0
        return self._earlier_lines[segment] + self._counts[segment]["num_lines"]


def write_tokens(work: TokenWork) -> None:
    """Write the token file, unless an earlier start has finished it, and print a summary.

    Raises:
        DataError: An input or the output is missing or bad. What was committed is kept, and the
            next start goes on from there.
    """
    prefix = work.prefix
    written = work.written()
    if written is not None and not Path(f"{prefix}.part/state.json").exists():
        shutil.rmtree(f"{prefix}.part", ignore_errors=True)
        print(
            f"{prefix}: complete already, {written.num_documents:,} documents,"
            f" {written.num_tokens:,} tokens; remove {manifest_path(prefix)} to write it again"
        )
        return
    started = time.monotonic()
    with TokenDraft(
        prefix,
        work.begun(),
        vocab_size=work.tokenizer.vocab_size,
        is_resumable=work.is_resumable,
    ) as draft:
        run = TokenRun(work, draft)
        if run.begun_documents:
            print(f"{prefix}: going on after {run.begun_documents:,} documents")
        if not draft.is_written:
            try:
                _encode(work, run, draft)
            except DataError as error:
                raise _with_rest(error, draft) from error
        manifest = draft.finish(run.described())
    _summarize(prefix, manifest, run, seconds=time.monotonic() - started)


def _with_rest(error: DataError, draft: TokenDraft) -> DataError:
    """Return the error, with what a later start need not do again."""
    kept = f"; {draft.num_committed:,} documents are kept: start again to go on"
    return DataError(f"{error}{kept if draft.progress else ''}")


def _encode(work: TokenWork, run: TokenRun, draft: TokenDraft) -> None:
    chunks = read_chunks(work.inputs, work.segments, work.texts, run.position)
    progress: ReadProgress | None = None
    total = _total_bytes(work.inputs, work.segments) if work.is_resumable else None
    with encoded_chunks(work.args, work.key, work.tokenizer, chunks) as results:
        for chunk, encoded in results:
            if progress is None:
                begun = chunk.num_done - (chunk.stop - chunk.start)
                progress = ReadProgress(work.prefix, total=total, begun=begun)
            run.take(chunk, encoded)
            progress.update(
                chunk.num_done, num_documents=draft.num_documents, num_tokens=draft.num_tokens
            )
    run.complete()


def _total_bytes(inputs: Sequence[Input], segments: Sequence[Segment]) -> int:
    return sum(
        (inputs[each.source].num_bytes or 0) if each.stop is None else each.stop - each.start
        for each in segments
    )


def _summarize(prefix: str, manifest: TokenManifest, run: TokenRun, *, seconds: float) -> None:
    """Print what was written, and the bad lines that were skipped."""
    totals = run.totals
    skipped = [f"{totals['num_empty_documents']:,} empty ones"]
    skipped += [f"{totals['num_blank_lines']:,} blank lines"] if totals["num_blank_lines"] else []
    skipped += [f"{totals['num_bad_lines']:,} bad lines"] if totals["num_bad_lines"] else []
    ratio = manifest.num_text_bytes / max(1, manifest.num_tokens)
    rate = (manifest.num_tokens - run.begun_tokens) / seconds
    print(
        f"{prefix}: {manifest.num_documents:,} documents ({' and '.join(skipped)} skipped),"
        f" {manifest.num_tokens:,} tokens of {manifest.dtype} from {manifest.num_text_bytes:,}"
        f" bytes ({ratio:.2f} bytes/token), {seconds:.1f} s, {rate:,.0f} tokens/s"
    )
    for problem in run.problems:
        print(printable(f"skipped: {problem}"), file=sys.stderr)
