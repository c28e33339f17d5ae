"""Writes the summary when every file is done, and removes what was needed on the way."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from megatron.trainer.io.atomic_write import write_text
from moe_app.filter.filter_page import filter_page
from moe_app.filter.filter_plan import FilterPlan
from moe_app.filter.filter_specs import DecontaminateRule
from moe_app.filter.filter_summary import summarize, summary_json
from moe_app.filter.pipeline.contamination import count_evaluation_texts
from moe_app.filter.pipeline.ledger import too_many_bad
from moe_app.filter.pipeline.reading import Documents
from moe_app.filter.work_folder import WorkFolder


class SummaryStep(PipelineStep):
    """Adds up the counts of all files; one task."""

    type = "SUMMARY"
    name = "summary"

    def __init__(self, plan: FilterPlan, folder: WorkFolder) -> None:
        super().__init__()
        self.plan = plan
        self.folder = folder

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        """Write summary.json, unless a start that was killed while it cleaned up has done so.

        Raises:
            DataError: All files together have more bad lines than may be.
        """
        if not self.folder.summary.exists():
            self._write()
        for leftover in self._leftovers():
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self.folder.data, ignore_errors=True)

    def _write(self) -> None:
        files = [
            json.loads(self.folder.counts(file).read_bytes())
            for file in range(len(self.plan.sources))
        ]
        summary = summarize(self.plan, files)
        if summary["bad_lines"] > self.plan.max_bad_lines:
            problem = summary["bad_line_places"][-1]["problem"]
            raise too_many_bad(summary["bad_lines"], self.plan.max_bad_lines, problem)
        notes = Counter(summary["notes"])
        for position, spec in enumerate(self.plan.filters):
            if isinstance(spec.options, DecontaminateRule):
                counts = count_evaluation_texts(self.folder.of_filter(position, "index"))
                notes.update({f"{spec.name}: {name}": count for name, count in counts.items()})
        summary |= {"notes": dict(notes)}
        write_text(self.folder.page, filter_page(summary))
        write_text(self.folder.summary, summary_json(summary))

    def _leftovers(self) -> Iterator[Path]:
        """Yield the unfinished files of tasks that were killed."""
        folder = self.folder
        for each in (folder.output, folder.kept, folder.dropped, folder.counts(0).parent):
            yield from each.glob("*.tmp-*")
