"""Turns a plan into stages: pipelines of datatrove, each of which needs the ones before it.

A task of a reading is one file, whatever the executor and its workers. So the output depends on
the files alone, and a task that was killed is done again from its file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datatrove.pipeline.base import PipelineStep

from megatron.trainer.data.repetition import RepetitionRule
from moe_app.filter.filter_plan import FilterPlan
from moe_app.filter.filter_specs import DecontaminateRule, ExactRule, FilterSpec, MinhashRule
from moe_app.filter.pipeline.contamination import ContaminationFilter, OverlapIndexer
from moe_app.filter.pipeline.document_filters import (
    LengthFilter,
    RepetitionFilter,
    RuleFilter,
    StarcoderFilter,
)
from moe_app.filter.pipeline.exact_duplicates import DuplicateFinder, KeyWriter
from moe_app.filter.pipeline.ledger import Ledger
from moe_app.filter.pipeline.near_duplicates import ClusterFinder, SignatureWriter, pair_finder
from moe_app.filter.pipeline.reading import EntryReader, KeptWriter, VerdictReplay
from moe_app.filter.pipeline.removals import ParagraphFilter, RemovalFilter
from moe_app.filter.pipeline.summary_step import SummaryStep
from moe_app.filter.pipeline.token_writer import TokenWriter
from moe_app.filter.rules import LengthRule, StarcoderRule
from moe_app.filter.work_folder import WorkFolder

_MOST_PARTITIONS = 64


@dataclass(frozen=True)
class FilterStage:
    """Holds one pipeline and how many tasks it is."""

    name: str
    steps: Sequence[PipelineStep]
    tasks: int


def build_stages(plan: FilterPlan, folder: WorkFolder) -> list[FilterStage]:
    """Return the stages of a plan, in order; the last writes the summary."""
    stages = [
        FilterStage(
            f"index-{position}",
            [OverlapIndexer(files, folder.of_filter(position, "index"), spec.options)],
            1,
        )
        for position, (spec, files) in enumerate(zip(plan.filters, plan.evaluation, strict=True))
        if isinstance(spec.options, DecontaminateRule)
    ]
    joins = [position for position, spec in enumerate(plan.filters) if _needs_all(spec)]
    starts = [0, *joins]
    for number, start in enumerate(starts):
        is_last = number + 1 == len(starts)
        ledger = Ledger(plan, folder, number=number, is_last=is_last)
        steps: list[PipelineStep] = [EntryReader(ledger)]
        if number:
            steps.append(VerdictReplay(ledger))
        steps += [_filter(ledger, each) for each in _cutting(plan, start)]
        end = len(plan.filters) if is_last else joins[number]
        steps += [_filter(ledger, each) for each in range(start, end)]
        steps.append(KeptWriter(ledger) if is_last else _collector(ledger, end))
        stages.append(FilterStage(f"reading-{number}", steps, len(plan.sources)))
        if not is_last:
            stages += _join(plan, folder, end)
    if plan.tokens is not None:
        stages.append(FilterStage("tokens", [TokenWriter(plan, folder)], len(plan.sources)))
    stages.append(FilterStage("summary", [SummaryStep(plan, folder)], 1))
    return stages


def _needs_all(spec: FilterSpec) -> bool:
    """Return whether a filter compares all documents."""
    return isinstance(spec.options, ExactRule | MinhashRule)


def _cutting(plan: FilterPlan, start: int) -> list[int]:
    """Return the filters before a reading's own that change texts; they do so in each reading."""
    found = []
    for position, spec in enumerate(plan.filters[:start]):
        if isinstance(spec.options, ExactRule) and spec.options.by == "paragraph":
            found.append(position)
    return found


def _partitions(plan: FilterPlan) -> int:
    return min(_MOST_PARTITIONS, len(plan.sources))


def _filter(ledger: Ledger, position: int) -> RuleFilter:
    """Return the step that drops what a filter drops."""
    folder = ledger.folder
    options: Any = ledger.plan.filters[position].options
    if isinstance(options, RepetitionRule):
        return RepetitionFilter(ledger, position, options)
    if isinstance(options, StarcoderRule):
        return StarcoderFilter(ledger, position, options)
    if isinstance(options, LengthRule):
        return LengthFilter(ledger, position, options)
    if isinstance(options, DecontaminateRule):
        return ContaminationFilter(ledger, position, folder.of_filter(position, "index"))
    removals = folder.of_filter(position, "removals")
    if isinstance(options, MinhashRule):
        return RemovalFilter(ledger, position, removals, partitions=1, reason="near-duplicate")
    kind = ParagraphFilter if options.by == "paragraph" else RemovalFilter
    return kind(ledger, position, removals, partitions=_partitions(ledger.plan), reason="duplicate")


def _collector(ledger: Ledger, position: int) -> PipelineStep:
    """Return the step that writes what a filter over all documents compares."""
    folder = ledger.folder
    options = ledger.plan.filters[position].options
    if isinstance(options, MinhashRule):
        signatures = folder.of_filter(position, "signatures")
        return SignatureWriter(ledger, signatures, folder.of_filter(position, "lines"), options)
    assert isinstance(options, ExactRule)
    return KeyWriter(ledger, folder.of_filter(position, "keys"), by=options.by)


def _join(plan: FilterPlan, folder: WorkFolder, position: int) -> Iterator[FilterStage]:
    """Yield the stages between two readings, which compare all documents."""
    files = len(plan.sources)
    removals = folder.of_filter(position, "removals")
    options = plan.filters[position].options
    if isinstance(options, MinhashRule):
        signatures, pairs = (folder.of_filter(position, each) for each in ("signatures", "pairs"))
        finder = pair_finder(signatures, pairs, options)
        yield FilterStage(f"pairs-{position}", [finder], options.buckets)
        clusters = ClusterFinder(pairs, folder.of_filter(position, "lines"), removals, files=files)
        yield FilterStage(f"clusters-{position}", [clusters], 1)
        return
    keys = folder.of_filter(position, "keys")
    duplicates = DuplicateFinder(keys, removals, files=files)
    yield FilterStage(f"duplicates-{position}", [duplicates], _partitions(plan))
