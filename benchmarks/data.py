"""Measures tokenization through the command, beside the library's batches and a pool over lines.

    python -m benchmarks.data --text corpus.jsonl --sentencepiece tokenizer.model \
        --hf tokenizer.json --repeat 4

The command is timed as users run it, from its start to its end, with as many workers as cores. The
library encodes all texts at once with as many threads; reading, JSON and writing do not count. The
pool is Megatron-LM's scheme: lines go to processes, 32 at a time, each encodes one after the other,
and lists of ids come back to be written. Every round visits each once; command and pool must write
the same tokens.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.timing import Summary, interleave, paired_ratio, summarize
from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer

REPO = Path(__file__).parents[1]
_LINES_AT_ONCE = 32
_SUBJECTS = ("command", "library", "pool")


@dataclass(frozen=True)
class Corpus:
    """Names what is tokenized, with what, and on how many cores."""

    text: str
    kind: str
    model: str
    cores: int
    folder: str


@dataclass(frozen=True)
class Cost:
    """Holds what a visit took."""

    seconds: float
    cpu_seconds: float
    """Of all its processes and threads; what other load on the machine leaves alone."""


class Clock:
    """Measures from its making on."""

    def __init__(self) -> None:
        self._start, self._cpu = time.perf_counter(), _cpu_seconds()

    def cost(self) -> Cost:
        """Return what has been spent."""
        return Cost(time.perf_counter() - self._start, _cpu_seconds() - self._cpu)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def run_command(corpus: Corpus) -> Cost:
    """Return what the command takes."""
    prefix = Path(corpus.folder) / "command"
    for path in prefix.parent.glob("command_*"):
        path.unlink()
    command = [sys.executable, "tools/preprocess_data.py", "--input", corpus.text, "--append-eod"]
    command += ["--tokenizer-type", corpus.kind, "--tokenizer-model", corpus.model]
    command += ["--output-prefix", str(prefix), "--workers", str(corpus.cores)]
    clock = Clock()
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    return clock.cost()


def run_library(corpus: Corpus) -> Cost:
    """Return what the library takes to encode all texts as one batch."""
    texts = [json.loads(line)["text"] for line in Path(corpus.text).open("rb")]
    encode = _batch_encoder(corpus)
    encode(texts[:50])
    clock = Clock()
    encode(texts)
    return clock.cost()


def _batch_encoder(corpus: Corpus) -> Callable[[Sequence[str]], object]:
    if corpus.kind == "HFTokenizer":
        from tokenizers import Tokenizer as TokenizersTokenizer

        fast = TokenizersTokenizer.from_file(corpus.model)
        return lambda texts: [
            each.ids for each in fast.encode_batch_fast(texts, add_special_tokens=False)
        ]
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=corpus.model)
    return lambda texts: processor.Encode(list(texts), num_threads=corpus.cores)


class _PoolEncoder:
    """Holds the tokenizer of a process of the pool."""

    tokenizer: Tokenizer

    @classmethod
    def start(cls, corpus: Corpus) -> None:
        """Load the tokenizer."""
        cls.tokenizer = load_tokenizer(corpus.kind, corpus.model)

    @classmethod
    def encode(cls, line: bytes) -> list[int]:
        """Return the ids of one line's text."""
        return [*cls.tokenizer.encode(json.loads(line)["text"]), cls.tokenizer.eod]


def run_pool(corpus: Corpus) -> Cost:
    """Return what a pool over lines takes, and write the tokens it finds."""
    clock = Clock()
    with (
        multiprocessing.get_context("fork").Pool(
            corpus.cores, initializer=_PoolEncoder.start, initargs=(corpus,)
        ) as pool,
        (Path(corpus.folder) / "pool.bin").open("wb") as file,
        open(corpus.text, "rb") as lines,
    ):
        for ids in pool.imap(_PoolEncoder.encode, lines, _LINES_AT_ONCE):
            file.write(np.array(ids, dtype=np.uint16).tobytes())
    return clock.cost()


def measure(corpus: Corpus, rounds: int) -> dict[str, list[Cost]]:
    """Return what each subject took, by round.

    Raises:
        SystemExit: Command and pool write other tokens.
    """
    calls = {"command": run_command, "library": run_library, "pool": run_pool}
    found: dict[str, list[Cost]] = {name: [] for name in _SUBJECTS}
    context = multiprocessing.get_context("spawn")
    for _, name in interleave(_SUBJECTS, rounds):
        # A process of its own for each visit: threads of a library do not outlive it.
        with ProcessPoolExecutor(1, mp_context=context) as process:
            found[name].append(process.submit(calls[name], corpus).result())
    folder = Path(corpus.folder)
    tokens = [(folder / name).read_bytes() for name in ("command_text_document.bin", "pool.bin")]
    if tokens[0] != tokens[1]:
        raise SystemExit(f"{corpus.kind}: command and pool write other tokens; nothing is compared")
    return found


def report(kind: str, size: int, found: dict[str, list[Cost]]) -> Iterator[str]:
    """Yield the lines of a tokenizer's table."""
    yield f"{kind}, {size / 1e6:,.1f} MB"
    for what in ("seconds", "cpu_seconds"):
        spent = {name: [getattr(each, what) for each in found[name]] for name in _SUBJECTS}
        unit = "MB/s" if what == "seconds" else "MB a CPU second"
        for name in _SUBJECTS:
            rate = summarize([size / 1e6 / each for each in spent[name]])
            yield f"  {name:17} {_written(rate)} {unit}"
        for name in _SUBJECTS[1:]:
            yield f"  command / {name:7} {_written(paired_ratio(spent[name], spent['command']))}"


def _written(summary: Summary) -> str:
    return f"{summary.median:6.2f} ({summary.low:.2f} to {summary.high:.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__)
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="JSON Lines")
    parser.add_argument("--sentencepiece", metavar="FILE", help="a .model to measure")
    parser.add_argument("--hf", metavar="FILE", help="a tokenizer.json to measure")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="times (%(default)s)")
    parser.add_argument(
        "--short", action="store_true", help="make a document of every line of the texts"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    models = {"SentencePieceTokenizer": args.sentencepiece, "HFTokenizer": args.hf}
    cores = len(os.sched_getaffinity(0))
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "in.jsonl"
        size = write_texts(text, args.text, repeat=args.repeat, is_short=args.short)
        for kind, model in models.items():
            if model is not None:
                corpus = Corpus(str(text), kind, str(Path(model).absolute()), cores, folder)
                found = measure(corpus, args.rounds)
                costs = {name: [asdict(each) for each in found[name]] for name in found}
                figures[kind] = {"bytes": size, "cores": cores, "costs": costs}
                print("\n".join(report(kind, size, found)), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def write_texts(path: Path, sources: Sequence[str], *, repeat: int, is_short: bool) -> int:
    """Write what is tokenized; return the bytes of its texts."""
    size = 0
    with path.open("w") as file:
        for _ in range(repeat):
            for source in sources:
                for line in Path(source).open("rb"):
                    text = json.loads(line)["text"]
                    for part in text.splitlines() if is_short else [text]:
                        if part.strip():
                            size += len(part.encode("utf-8"))
                            file.write(json.dumps({"text": part}) + "\n")
    return size


if __name__ == "__main__":
    sys.exit(main())
