"""Names the files in the output folder of a filtered corpus."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WorkFolder:
    """Holds the output folder and names what is in it.

    A file's number is its place among the sources; a filter's position, its place in the recipe.
    """

    output: Path

    @property
    def kept(self) -> Path:
        """Return the folder of kept documents."""
        return self.output / "kept"

    @property
    def dropped(self) -> Path:
        """Return the folder of dropped documents."""
        return self.output / "dropped"

    @property
    def tokens(self) -> Path:
        """Return the folder of token files."""
        return self.output / "tokens"

    @property
    def summary(self) -> Path:
        """Return the file of counts, which is there when all is done."""
        return self.output / "summary.json"

    @property
    def page(self) -> Path:
        """Return the page for people."""
        return self.output / "summary.html"

    @property
    def work(self) -> Path:
        """Return the folder of what is needed between two starts."""
        return self.output / "work"

    @property
    def data(self) -> Path:
        """Return the folder of what stages hand on, removed when all is done."""
        return self.work / "data"

    @property
    def submission(self) -> Path:
        """Return the note of what was submitted to SLURM last."""
        return self.work / "submission.json"

    def stage(self, name: str) -> Path:
        """Return the folder of a stage's log and of the marks of its finished tasks."""
        return self.work / "stages" / name

    def counts(self, file: int) -> Path:
        """Return the counts of one file."""
        return self.work / "counts" / f"{file:05d}.json"

    def verdicts(self, number: int, file: int) -> Path:
        """Return what a reading decided on one file."""
        return self.data / f"verdicts-{number}" / f"{file:05d}.jsonl"

    def of_filter(self, position: int, what: str) -> Path:
        """Return a folder of one filter."""
        return self.data / f"filter-{position}" / what
