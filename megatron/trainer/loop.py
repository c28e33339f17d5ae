"""The run: steps, records, evaluations and checkpoints, in order."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron.trainer.hooks import Hook
from megatron.trainer.state import ForwardStep, TrainState
from megatron.trainer.step import StepResult, evaluate, train_step


def train(
    state: TrainState,
    forward_step: ForwardStep,
    *,
    hooks: Sequence[Hook],
    save: Callable[[TrainState], None] | None,
) -> None:
    """Train until `train_iters` steps are done.

    Args:
        state: where the run stands; changed in place.
        forward_step: megatron-core's forward step, `step.language_model_step` for pretraining.
        hooks: watchers of this rank.
        save: writes a checkpoint, a collective call; None writes none.
    """
    cfg = state.cfg
    train_iters = cfg.training.train_iters
    evaluated = saved = state.iteration
    seconds, steps = 0.0, 0
    for hook in hooks:
        hook.on_start(state.iteration, train_iters)
    try:
        while state.iteration < train_iters:
            if state.metrics is not None:
                state.metrics.reset()
            started = time.perf_counter()
            result = train_step(state, forward_step)
            seconds += time.perf_counter() - started
            steps += 1
            for hook in hooks:
                hook.on_step(state.iteration, result.lm_loss)
            if _is_due(state, cfg.logging.log_interval):
                record = _step_record(state, result, seconds_per_step=seconds / steps)
                for hook in hooks:
                    hook.on_log(record)
                seconds, steps = 0.0, 0
            if _is_due(state, cfg.evaluation.eval_interval):
                _evaluate_all(state, forward_step, hooks)
                evaluated = state.iteration
            if save is not None and _is_due(state, cfg.checkpoint.save_interval):
                save(state)
                saved = state.iteration
        if evaluated < state.iteration:
            _evaluate_all(state, forward_step, hooks)
        if save is not None and saved < state.iteration:
            save(state)
    finally:
        for hook in hooks:
            hook.on_end()


def _is_due(state: TrainState, interval: int) -> bool:
    return interval > 0 and state.iteration % interval == 0


def _step_record(
    state: TrainState, result: StepResult, *, seconds_per_step: float
) -> dict[str, Any]:
    """One object of `metrics.jsonl`; docs/run_directory.md says what each number means."""
    cfg = state.cfg.training
    tokens_per_second = cfg.global_batch_size * cfg.seq_length / seconds_per_step
    return {
        **_position(state),
        "lm_loss": result.lm_loss,
        **(state.metrics.reduce() if state.metrics is not None else {}),
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "tokens_per_second": tokens_per_second,
        "model_tflops": tokens_per_second * state.flops_per_token / state.ctx.world_size / 1e12,
        "skipped": int(result.skipped),
    }


def _evaluate_all(state: TrainState, forward_step: ForwardStep, hooks: Sequence[Hook]) -> None:
    if not state.validation:
        return
    losses = {name: evaluate(state, forward_step, name) for name in state.validation}
    record = {**_position(state), "valid_loss": losses}
    for hook in hooks:
        hook.on_evaluation(record)


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
