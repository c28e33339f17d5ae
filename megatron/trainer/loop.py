"""Runs the training loop: steps, records, evaluations and checkpoints, in order."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from megatron.trainer.checkpoint import BackgroundSaver
from megatron.trainer.errors import StepRefusedError
from megatron.trainer.health.stop import Stop, StopRule
from megatron.trainer.health.stragglers import BusyClock
from megatron.trainer.hooks.base import Hook
from megatron.trainer.objective import Objective, with_perplexity
from megatron.trainer.state import TrainState
from megatron.trainer.step import StepResult, evaluate, train_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Upkeep:
    """Saves checkpoints, and goes back to them; every part may be left out."""

    save: Callable[[TrainState], None] | None = None
    """Writes a checkpoint, or lets `background` begin to; a collective call. None writes none."""
    background: BackgroundSaver | None = None
    """Writes what `save` begins; None where `save` returns when the checkpoint is complete."""
    rewind: Callable[[TrainState, int], bool] | None = None
    """Goes back to a checkpoint after a step too bad to skip, given the iteration of this run's
    newest, a collective call; False if it may not."""
    evaluate_first: bool = False
    """Begin with the evaluation that an earlier job was stopped in."""


def train(
    state: TrainState,
    objective: Objective,
    *,
    hooks: Sequence[Hook],
    upkeep: Upkeep | None = None,
) -> Stop | None:
    """Train until the run's plan says that it is done, or until it has to stop early.

    Args:
        state: where the run stands; changed in place.
        objective: what is minimized, `objective.NEXT_TOKEN` in pretraining.
        hooks: watchers of this rank; at every moment they are called in this order.
        upkeep: checkpoints and what becomes of bad steps; None does without.

    Returns:
        Why it stopped early; None if it is finished. Either way all is saved.

    Raises:
        StepRefusedError: a step was too bad, and may be neither skipped nor undone.
    """
    run = _Run(state, objective, hooks, upkeep or Upkeep())
    for hook in hooks:
        hook.on_start(state.iteration, state.last_iteration)
    try:
        stop = run.to_the_end()
    except BaseException as error:
        if isinstance(error, Exception):
            run.finish_save_after(error)
        for hook in hooks:
            try:
                hook.on_end()
            except Exception as error:  # must not hide what ended the run
                logger.warning("%s did not end well: %s", type(hook).__name__, error)
        raise
    finally:
        state.train_data.stop_reading()
    for hook in hooks:
        hook.on_end()
    return stop


class _Run:
    """Holds what a call of `train` remembers between steps."""

    def __init__(
        self, state: TrainState, objective: Objective, hooks: Sequence[Hook], upkeep: Upkeep
    ) -> None:
        self.state = state
        self.objective = objective
        self.figures = with_perplexity(objective, state.token_bytes)
        self.hooks = hooks
        self.upkeep = upkeep
        self.stop_rule = StopRule(
            state.cfg,
            device=state.ctx.device,
            iteration=state.iteration,
            last=state.last_iteration,
        )
        # One rank needs no other's opinion: it is asked between steps, without a collective.
        self._notice = self.stop_rule.notice if state.ctx.world_size > 1 else None
        self.evaluated = -1 if upkeep.evaluate_first else state.iteration
        self.saved = state.iteration
        self._seconds, self._samples, self._skipped = 0.0, 0, 0
        is_timed = state.cfg.logging.log_straggler
        self._clock = BusyClock(state.ctx.device) if is_timed else None

    def to_the_end(self) -> Stop | None:
        """Take steps; log, evaluate and save when due."""
        cfg, state = self.state.cfg, self.state
        if self.evaluated < 0:
            self._evaluate_all()
        while not state.is_done and not self._must_stop():
            phase = state.train_data.phase
            try:
                result = self._step()
            except StepRefusedError as refused:
                if not self._rewind(str(refused)):
                    raise
                continue
            self._report(result, phase_before=phase)
            if self._is_due(cfg.logging.log_interval):
                self._log(result)
            if self._is_due(cfg.evaluation.eval_interval):
                self._evaluate_all()
            if self._is_due(cfg.checkpoint.save_interval):
                self._save()
            if self.upkeep.background is not None and self.upkeep.background.poll():
                self._finish_save()
        if self.stop_rule.stop is None and self.evaluated < state.iteration:
            self._evaluate_all()
        if self.saved < state.iteration:
            self._save()
        self._finish_save()
        return self.stop_rule.stop

    def _must_stop(self) -> bool:
        return self.stop_rule.check(self.state.iteration) is not None

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and self.state.iteration % interval == 0

    def _begin(self, stage: str) -> None:
        for hook in self.hooks:
            hook.on_stage(stage, self.state.iteration + 1)

    def _step(self) -> StepResult:
        self._begin("step")
        if self.state.metrics is not None:
            self.state.metrics.reset()
        started = time.perf_counter()
        with self._clock or nullcontext():
            result = train_step(self.state, self.objective, notice=self._notice)
        self._seconds += time.perf_counter() - started
        self._samples += result.global_batch_size
        if self._notice is not None and not self.state.is_done:  # nothing is left to be stopped
            self.stop_rule.hear(result.notice)
        return result

    def _report(self, result: StepResult, *, phase_before: str | None) -> None:
        for hook in self.hooks:
            hook.on_step(self.state.iteration, result.loss)
        if result.skipped is not None:
            self._skipped += 1
            self._event("skip", result.skipped)
        phase = self.state.train_data.phase
        if phase != phase_before and phase is not None:
            self._event("phase", f"{phase} begins")

    def _log(self, result: StepResult) -> None:
        record = step_record(
            self.state,
            result,
            samples_per_second=self._samples / self._seconds,
            skipped=self._skipped,
        )
        if self._clock is not None:
            record |= self._clock.reduce()
        for hook in self.hooks:
            hook.on_log(record)
        self._seconds, self._samples, self._skipped = 0.0, 0, 0

    def _evaluate_all(self) -> None:
        """Evaluate validation sets and tasks; make no record if the run has to stop meanwhile."""
        self.stop_rule.forget()
        figures = {}
        for name in self.state.validation:
            found = evaluate(self.state, self.figures, name, is_over=self._evaluation_is_over)
            if found is None:
                return
            figures[name] = found
        more: Mapping[str, Any] = {}
        if self.state.tasks is not None:
            scored = self.state.tasks.evaluate(self.state, is_over=self._evaluation_is_over)
            if scored is None:
                return
            more = scored
        self.evaluated = self.state.iteration
        if figures or more:
            record = evaluation_record(self.state, self.objective.loss_name, figures) | dict(more)
            for hook in self.hooks:
                hook.on_evaluation(record)

    def _evaluation_is_over(self) -> bool:
        self._begin("evaluation")
        return self.stop_rule.check(self.state.iteration, is_evaluating=True) is not None

    def _save(self) -> None:
        if self.upkeep.save is None:
            return
        self._begin("save")
        self.stop_rule.forget()
        self._finish_save()
        started = time.perf_counter()
        self.upkeep.save(self.state)
        self.saved = self.state.iteration
        seconds = time.perf_counter() - started
        if self.upkeep.background is None:
            self._report_save(self.saved, seconds, blocked_seconds=seconds)

    def _finish_save(self) -> None:
        """Wait for the checkpoint that is being written in the background, if there is one."""
        background = self.upkeep.background
        if background is None or not background.is_saving:
            return
        started = time.perf_counter()
        done = background.wait()
        waited_s = time.perf_counter() - started
        logger.info("saved %s in %.1f s, in the background", done.path, done.seconds)
        blocked_s = done.blocked_seconds + waited_s
        self._report_save(done.iteration, done.seconds, blocked_seconds=blocked_s)

    def finish_save_after(self, error: Exception) -> None:
        """Let a checkpoint that is being written become complete although the run ends."""
        try:
            self._finish_save()
        except Exception as failed:  # must not hide what ended the run
            if failed is not error:
                logger.warning("the checkpoint being written is lost: %s", failed)

    def _report_save(self, iteration: int, seconds: float, *, blocked_seconds: float) -> None:
        for hook in self.hooks:
            hook.on_save(iteration, seconds=seconds, blocked_seconds=blocked_seconds)

    def _rewind(self, why: str) -> bool:
        """Go back to the newest checkpoint; False if the run may not."""
        before = self.state.iteration
        self._finish_save()
        if self.upkeep.rewind is None or not self.upkeep.rewind(self.state, self.saved):
            return False
        iteration = self.state.iteration
        self.evaluated = self.saved = iteration
        self._seconds, self._samples, self._skipped = 0.0, 0, 0
        for hook in self.hooks:
            hook.on_rewind(iteration)
        self._event(
            "rewind",
            f"from iteration {before}: {why}",
            rewound_from=before,
            **planned_end(self.state),
        )
        return True

    def _event(self, name: str, detail: str, **more: Any) -> None:
        for hook in self.hooks:
            hook.on_event(self.state.iteration, name, detail, **more)


def planned_end(state: TrainState) -> dict[str, int]:
    """Return the steps done and the tokens consumed in the end, for an event that changes them."""
    samples = state.train_data.consumed_samples + state.plan.samples_left(state.progress)
    return {
        "train_iters": state.last_iteration,
        "train_tokens": samples * state.train_data.seq_length,
    }


def step_record(
    state: TrainState, result: StepResult, *, samples_per_second: float, skipped: int
) -> dict[str, Any]:
    """Make a step's record of `metrics.jsonl`; docs/run_directory.md defines every number."""
    tokens_per_second = samples_per_second * state.cfg.training.seq_length
    return {
        **_position(state),
        **result.metrics,
        **(state.metrics.reduce() if state.metrics is not None else {}),
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "global_batch_size": result.global_batch_size,
        "tokens_per_second": tokens_per_second,
        "model_tflops": tokens_per_second * state.flops_per_token / state.ctx.world_size / 1e12,
        "skipped": skipped,
    }


def evaluation_record(
    state: TrainState, loss_name: str, figures: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Make an evaluation's record of `metrics.jsonl`, of each set's figures by name."""
    losses = {name: each[loss_name] for name, each in figures.items()}
    others = {
        name: {key: value for key, value in each.items() if key != loss_name}
        for name, each in figures.items()
    }
    more = {"valid_metrics": others} if any(others.values()) else {}
    return {**_position(state), "valid_loss": losses, **more}


def _position(state: TrainState) -> dict[str, Any]:
    data, length = state.train_data, state.cfg.training.seq_length
    per_source = data.consumed_per_source()
    return {
        "iteration": state.iteration,
        "phase": data.phase,
        "consumed_samples": data.consumed_samples,
        "consumed_tokens": data.consumed_samples * length,
        "consumed_samples_per_source": per_source,
        "consumed_tokens_per_source": {name: n * length for name, n in per_source.items()},
    }
