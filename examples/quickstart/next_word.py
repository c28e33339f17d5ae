"""Ask which word comes next in the documentation that the quickstart holds back from training.

    python examples/quickstart/next_word.py items RECIPE OUTPUT [SOURCE]
    python examples/quickstart/next_word.py accuracy RUN ITEMS

`items` writes a file for --eval-tasks, `accuracy` prints what a run's evaluations say of it.

An item is a stretch of a held-back document and four words: the one that follows, which is common
in the documents for training, and three that are about as common there. So how frequent words are
tells little. An item whose last words, answer included, stand anywhere in the text for training is
left out.
"""

import bisect
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.build import build_data
from megatron.trainer.data.data_path import prefix_of
from megatron.trainer.errors import DataError, UserError
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.records.record_file import read_records
from megatron.trainer.records.run_dir import METRICS_NAME

NUM_ITEMS = 400
FEWEST, MOST = 20, 24
"""Words of a context."""
OWN = 8
"""Words, answer included, that no text for training has in this order."""
COMMON = 100
"""How often the documents for training have the answer, at least."""
NEAR = 24
"""How many words, those nearest by frequency, the wrong ones are drawn from."""
_SEED = 20240903
_SUFFIX = "_text_document"
_WORD = re.compile(r"(?<=[A-Za-z,] )[a-z]{2,}(?=[\s,.;:])")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Holds a corpus as its run uses it."""

    train: list[str]
    held_back: list[str]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Holds a context and the word that follows."""

    context: str
    answer: str

    @property
    def last_words(self) -> tuple[str, ...]:
        """Return what must not stand in the text for training."""
        return (*self.context.split()[1 - OWN :], self.answer)


def read_texts(recipe: Path) -> dict[str, Texts]:
    """Return the documents of each source, divided as the token files are; by name.

    Raises:
        DataError: a source's documents are not beside its token file.
    """
    given = yaml.safe_load(recipe.read_text("utf-8"))
    cfg = DataConfig(data_path=tuple(map(str, given["data_path"])), split=given["split"])
    data = build_data(cfg, vocab_size=1 << 31, seq_length=given["seq_length"], seed=0)
    found = {}
    for source, part in zip(data.train.sources, cfg.data_path[1::2], strict=True):
        path = Path(prefix_of(part).removesuffix(_SUFFIX) + ".jsonl")
        texts = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
        cut, rest = source.num_documents, data.validation[source.name].source.num_documents
        if cut is None or rest is None or cut + rest != len(texts):
            raise DataError(
                f"{path} has {len(texts)} documents, its token file {cut} and {rest}; both must be"
                " of one corpus; remove the directory and start over"
            )
        found[source.name] = Texts(train=texts[:cut], held_back=texts[cut:])
    return found


def questions(texts: Sequence[str]) -> Iterator[Question]:
    """Yield every word of the texts that stands in prose, after as many words as a context has."""
    for text in texts:
        starts = [match.start() for match in re.finditer(r"\S+", text)]
        for match in _WORD.finditer(text):
            place = bisect.bisect_left(starts, match.start())
            if place >= FEWEST:
                context = text[starts[max(0, place - MOST)] : match.start()].rstrip()
                yield Question(context=context, answer=match[0])


def known_words(texts: Sequence[str], wanted: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Return those of the stretches of words that a text has; only spaces may differ."""
    known = set()
    for text in texts:
        words = text.split()
        known |= wanted.intersection(zip(*(words[n:] for n in range(OWN)), strict=False))
    return known


def make_items(texts: dict[str, Texts], *, name: str) -> list[dict[str, object]]:
    """Return the items of a source's held-back documents.

    Args:
        texts: of all sources that the model is trained on.
        name: of the source.
    """
    found = list(questions(texts[name].held_back))
    train = [text for each in texts.values() for text in each.train]
    known = known_words(train, {each.last_words for each in found})
    counts = Counter(word for text in texts[name].train for word in _WORD.findall(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    draw = random.Random(_SEED)
    fresh = [
        each for each in found if counts[each.answer] >= COMMON and each.last_words not in known
    ]
    items = []
    for each in draw.sample(fresh, min(NUM_ITEMS, len(fresh))):
        first = max(0, ranked.index(each.answer) - NEAR // 2)
        near = [word for word in ranked[first : first + NEAR + 1] if word != each.answer]
        choices = [each.answer, *draw.sample(near, 3)]
        is_most_frequent = counts[each.answer] > max(counts[word] for word in choices[1:])
        draw.shuffle(choices)
        items.append(
            {
                "context": each.context,
                "choices": choices,
                "answer": each.answer,
                "is_most_frequent": is_most_frequent,
            }
        )
    return items


def write_items(recipe: Path, output: Path, source: str = "docs") -> None:
    """Write the items of a source of the recipe, by default its documentation."""
    items = make_items(read_texts(recipe), name=source)
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    write_text(output, text)
    print(f"{output}: {len(items)} items, which the text for training does not have")


def describe_accuracy(run: Path, path: Path) -> list[str]:
    """Return lines that set the accuracies of a run beside those of two that know nothing."""
    items = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    frequent = sum(item["is_most_frequent"] for item in items) / len(items)
    rows = [("any of the four words", 0.25), ("the most frequent of them", frequent)]
    for record in read_records(run / METRICS_NAME):
        found = record.get("task_accuracy", {}).get(path.stem)
        if found is not None:
            rows.append((f"the model after {record['iteration']:,} steps", found["none"]))
    return [f"{label:28}{share:6.1%}" for label, share in rows]


def main() -> int:
    """Do what the first argument says."""
    what, first, second, *source = sys.argv[1:]
    try:
        if what == "items":
            write_items(Path(first), Path(second), *source)
        else:
            print("\n".join(describe_accuracy(Path(first), Path(second))))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
