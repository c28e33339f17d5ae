"""The moments of a run that an observer can take part in.

A hook is handed to the ranks that it should run on. One that is not on every rank never calls a
collective.
"""

from typing import Any

from megatron.trainer.records.record_file import Record


class Hook:
    """Watches a run without changing it; a subclass overrides the moments that it needs."""

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Training begins after `iteration` steps."""

    def on_stage(self, stage: str, iteration: int) -> None:
        """A stage of step `iteration` begins: `step`, `save`, or `evaluation` for each batch."""

    def on_step(self, iteration: int, lm_loss: float) -> None:
        """Step `iteration` is done."""

    def on_log(self, record: Record) -> None:
        """A step's record is complete; every log_interval steps."""

    def on_evaluation(self, record: Record) -> None:
        """The validation sets were evaluated."""

    def on_save(self, iteration: int, seconds: float) -> None:
        """A checkpoint of `iteration` steps was written, in so many seconds."""

    def on_rewind(self, iteration: int) -> None:
        """The run has gone back to `iteration` steps, and will take the later ones again."""

    def on_event(self, iteration: int, name: str, detail: str, **more: Any) -> None:
        """Something happened that a reader of the run should know: `skip`, `phase`, `rewind`.

        Args:
            iteration: steps done.
            name: of the event, as docs/run_directory.md lists them.
            detail: one sentence.
            more: further JSON values.
        """

    def on_end(self) -> None:
        """Training is over, or failed."""
