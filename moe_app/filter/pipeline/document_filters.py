"""Makes datatrove's filters of the rules that look at one document at a time."""

import functools
from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatron.trainer.data.repetition import RepetitionRule, find_repetition
from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer
from megatron.trainer.errors import DataError
from moe_app.filter.filter_plan import CountingTokenizer
from moe_app.filter.pipeline.ledger import Dropped, Ledger
from moe_app.filter.pipeline.reading import Documents
from moe_app.filter.rules import LengthRule, StarcoderRule, Verdict, find_stars


class RuleFilter(BaseFilter):
    """Drops the documents on which a rule has a verdict.

    Args:
        ledger: Takes what is dropped.
        position: The filter's, in the recipe.
    """

    type = "FILTER"

    def __init__(self, ledger: Ledger, position: int) -> None:
        super().__init__(exclusion_writer=ledger)
        self.ledger = ledger
        self.position = position
        self.name = ledger.plan.filters[position].name

    def run(self, data: Documents | None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield what the rule has nothing against."""
        self.prepare(rank)
        yield from super().run(data, rank, world_size)

    def prepare(self, rank: int) -> None:
        """Load what the rule needs, in the process that uses it."""

    @abstractmethod
    def judge(self, document: Document) -> Verdict | None:
        """Return why a document is dropped; None keeps it."""

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Return whether a document is kept, in datatrove's form."""
        verdict = self.judge(doc)
        if verdict is None:
            return True
        doc.metadata["dropped"] = Dropped(position=self.position, verdict=verdict)
        return False, verdict.reason


@functools.lru_cache(maxsize=1)
def _load(file: CountingTokenizer) -> Tokenizer:
    return load_tokenizer(file.type, file.model, eod_token=file.eod_token)


class RepetitionFilter(RuleFilter):
    """Drops documents with a run of a repeated n-gram of tokens."""

    def __init__(self, ledger: Ledger, position: int, rule: RepetitionRule) -> None:
        super().__init__(ledger, position)
        self.rule = rule

    def judge(self, document: Document) -> Verdict | None:
        """Return the run that is too long."""
        assert self.ledger.plan.tokenizer is not None
        ids = _load(self.ledger.plan.tokenizer).encode(document.text)
        found = find_repetition(np.array(ids, np.int32), self.rule)
        if found is None:
            return None
        detail = {"period": found.period, "repeats": found.repeats, "token": found.start}
        return Verdict("repeats", detail)


class StarcoderFilter(RuleFilter):
    """Drops code by stars and by the share of its most frequent words."""

    def __init__(self, ledger: Ledger, position: int, rule: StarcoderRule) -> None:
        super().__init__(ledger, position)
        self.rule = rule

    def judge(self, document: Document) -> Verdict | None:
        """Return the test that a document fails; note documents without a star count."""
        value = document.metadata["entry"].value
        if find_stars(value, self.rule.stars_key) is None:
            self.ledger.notes[f"{self.name}: documents without a star count"] += 1
        return self.rule.judge(document.text, value)


class LengthFilter(RuleFilter):
    """Drops documents outside bounds of length."""

    def __init__(self, ledger: Ledger, position: int, rule: LengthRule) -> None:
        super().__init__(ledger, position)
        self.rule = rule

    def judge(self, document: Document) -> Verdict | None:
        """Return the bound that a document breaks."""
        return self.rule.judge(document.text, self._count_tokens)

    def _count_tokens(self, text: str) -> int:
        assert self.ledger.plan.tokenizer is not None
        return len(_load(self.ledger.plan.tokenizer).encode(text))


def check_tokenizer(file: CountingTokenizer) -> None:
    """Load the tokenizer once before any task does, so that what is wrong is said at once.

    Raises:
        DataError: It cannot be read.
    """
    if _load(file).vocab_size < 1:
        raise DataError(f"tokenizer {file.model} has no token; restore the file")
