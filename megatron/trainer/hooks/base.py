"""Defines the moments of a run at which hooks are called.

A hook is handed to the ranks that it should run on. One that is not on every rank never calls a
collective.
"""

from typing import Any

from megatron.trainer.records.record_file import Record


class Hook:
    """Observes a run without changing it; a subclass overrides the moments that it needs."""

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Called when training begins, after `iteration` steps."""

    def on_stage(self, stage: str, iteration: int) -> None:
        """Called when a stage of step `iteration` begins: `step`, `save`, an `evaluation` batch."""

    def on_step(self, iteration: int, loss: float) -> None:
        """Called when step `iteration` is done."""

    def on_log(self, record: Record) -> None:
        """Called with a step's record, every log_interval steps."""

    def on_evaluation(self, record: Record) -> None:
        """Called with the record of an evaluation."""

    def on_save(self, iteration: int, *, seconds: float, blocked_seconds: float) -> None:
        """Called when a checkpoint is complete.

        Args:
            iteration: steps that it holds.
            seconds: from the begin of the save until then.
            blocked_seconds: of these, how long training stood still.
        """

    def on_rewind(self, iteration: int) -> None:
        """Called when the run has gone back to `iteration` steps; it will repeat the later ones."""

    def on_event(self, iteration: int, name: str, detail: str, **more: Any) -> None:
        """Called for an event that the run's reader should know: `skip`, `phase` or `rewind`.

        Args:
            iteration: steps done.
            name: of the event, as docs/run_directory.md lists them.
            detail: one sentence.
            more: further JSON values.
        """

    def on_end(self) -> None:
        """Called when training has ended, or failed."""
