"""Pretrain a mixture-of-experts language model; start it with torchrun, or alone on one device."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from megatron.trainer.checkpoint import BackgroundSaver
from megatron.trainer.health.preflight import preflight
from megatron.trainer.health.stop import Stop
from megatron.trainer.health.watchdog import Watchdog, start_watchdog, timeout_before
from megatron.trainer.hooks.base import Hook
from megatron.trainer.hooks.journal import Journal, open_journal
from megatron.trainer.loop import Upkeep, planned_end, train
from megatron.trainer.objective import NEXT_TOKEN, Objective
from megatron.trainer.resume import (
    check_directories,
    checkpoint_writer,
    evaluation_is_pending,
    resume,
    rewind,
)
from megatron.trainer.runtime import signals
from megatron.trainer.runtime.collective import on_all_ranks
from megatron.trainer.runtime.launch import (
    RunContext,
    environment_rank,
    initialize,
    run_main,
    shut_down,
)
from megatron.trainer.runtime.log import configure_logging
from megatron.trainer.runtime.upstream_warnings import hide_upstream_warnings
from megatron.trainer.state import TrainState
from moe_app.command_line import program
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_app.pretrain.hooks import build_hooks
from moe_app.pretrain.router_saturation import RouterSaturation

logger = logging.getLogger("pretrain")

C = TypeVar("C", bound=PretrainConfig)


@hide_upstream_warnings()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe and flags in `argv`; returns the exit status."""
    return run_main(
        lambda: pretrain(parse_recipe(argv, prog=program("pretrain"), description=__doc__))
    )


class Stage(Protocol[C]):
    """Declares what differs between pretraining and what comes after it."""

    def open(self, cfg: C, ctx: RunContext) -> C:
        """Open the data; return the config with the lengths that follow from them."""

    def build(self, cfg: C, ctx: RunContext) -> tuple[TrainState, Objective]:
        """Return the state at iteration 0, and what is minimized; a collective call."""


class Pretraining:
    """Predicts the next token of token files."""

    def open(self, cfg: PretrainConfig, ctx: RunContext) -> PretrainConfig:
        """Return the config as it is."""
        return cfg

    def build(self, cfg: PretrainConfig, ctx: RunContext) -> tuple[TrainState, Objective]:
        """See `Stage.build`."""
        return build_state(cfg, ctx), NEXT_TOKEN


def pretrain(cfg: PretrainConfig) -> int:
    """Pretrain as `cfg` says; see `run_stage`."""
    return run_stage(cfg, Pretraining())


def run_stage(cfg: C, stage: Stage[C]) -> int:
    """Train as `cfg` says, from scratch or from a checkpoint; returns the exit status."""
    configure_logging(environment_rank())
    if cfg.reliability.exit_signal_handler:
        signals.listen()
    else:
        signals.stop_deferring()
    try:
        return _run(cfg, stage)
    finally:
        signals.stop_listening()


def _run(cfg: C, stage: Stage[C]) -> int:
    ctx = initialize(cfg)
    if cfg.reliability.preflight:
        save = None if cfg.checkpoint.save is None else Path(cfg.checkpoint.save)
        for line in preflight(ctx, timeout_s=cfg.reliability.preflight_timeout, save=save):
            logger.info(line)
    watchdog = start_watchdog(ctx, timeout_before(cfg.parallel.distributed_timeout_minutes))
    try:
        cfg = stage.open(cfg, ctx)
        check_directories(cfg)
        journal = on_all_ranks(
            "opening the run directory",
            lambda: open_journal(
                cfg.checkpoint.save, rank=ctx.rank, train_iters=cfg.training.train_iters
            ),
        )
        with journal.recording_errors():
            stop = _train(cfg, ctx, stage, journal, watchdog)
            journal.end(stop)
    finally:
        watchdog.stop()
    shut_down()
    return cfg.reliability.requeue_exit_code if stop is not None and stop.requeue else 0


def _train(
    cfg: C, ctx: RunContext, stage: Stage[C], journal: Journal, watchdog: Watchdog
) -> Stop | None:
    state, objective = stage.build(cfg, ctx)
    beginning = resume(state, cfg.model)
    for skipped in beginning.skipped:
        journal.on_event(state.iteration, "fallback", skipped)
    journal.on_event(state.iteration, beginning.event, beginning.detail, **planned_end(state))
    if beginning.is_continued:
        journal.saved = state.iteration
    hooks: list[Hook] = [journal, watchdog]
    hooks += on_all_ranks("opening the records", lambda: build_hooks(cfg, state))
    if cfg.logging.log_router_saturation is not None:
        hooks.append(RouterSaturation(state, cfg.model, NEXT_TOKEN))
    background = BackgroundSaver(ctx.device) if cfg.checkpoint.async_save else None
    upkeep = Upkeep(
        save=checkpoint_writer(state, background, loaded=beginning.loaded),
        background=background,
        rewind=rewind,
        evaluate_first=beginning.is_continued and evaluation_is_pending(state),
    )
    return train(state, objective, hooks=hooks, upkeep=upkeep)
