"""Pretrain a mixture-of-experts language model; start it with torchrun, or alone on one device."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.trainer import signals

if __name__ == "__main__":
    # The imports below take seconds, in which a notice must not be lost.
    signals.listen()

import recipe

from megatron.trainer.ending import Stop
from megatron.trainer.journal import Journal, open_journal
from megatron.trainer.launch import (
    RunContext,
    agree,
    environment_rank,
    initialize,
    run_main,
    shut_down,
)
from megatron.trainer.log import configure_logging
from megatron.trainer.loop import Upkeep, train
from megatron.trainer.preflight import preflight
from megatron.trainer.resume import (
    check_directories,
    checkpoint_writer,
    evaluation_is_pending,
    resume,
    rewind,
)
from megatron.trainer.step import language_model_step
from megatron.trainer.watchdog import Watchdog, start_watchdog, timeout_before

logger = logging.getLogger("pretrain")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe and flags in `argv`; returns the exit status."""
    return run_main(lambda: pretrain(recipe.parse(argv, prog="pretrain.py", description=__doc__)))


def pretrain(cfg: recipe.PretrainConfig) -> int:
    """Train as `cfg` says, from scratch or from a checkpoint; returns the exit status."""
    configure_logging(environment_rank())
    if cfg.reliability.exit_signal_handler:
        signals.listen()
    else:
        signals.ignore_no_more()
    try:
        return _pretrain(cfg)
    finally:
        signals.stop_listening()


def _pretrain(cfg: recipe.PretrainConfig) -> int:
    ctx = initialize(cfg)
    if cfg.reliability.preflight:
        save = None if cfg.checkpoint.save is None else Path(cfg.checkpoint.save)
        for line in preflight(ctx, timeout_s=cfg.reliability.preflight_timeout, save=save):
            logger.info(line)
    watchdog = start_watchdog(ctx, timeout_before(cfg.parallel.distributed_timeout_minutes))
    try:
        check_directories(cfg.checkpoint)
        journal = agree(
            lambda: open_journal(
                cfg.checkpoint.save, rank=ctx.rank, train_iters=cfg.training.train_iters
            )
        )
        with journal.recording_errors():
            stop = _train(cfg, ctx, journal, watchdog)
            journal.end(stop)
    finally:
        watchdog.stop()
    shut_down()
    return cfg.reliability.requeue_exit_code if stop is not None and stop.requeue else 0


def _train(
    cfg: recipe.PretrainConfig, ctx: RunContext, journal: Journal, watchdog: Watchdog
) -> Stop | None:
    state = recipe.build_state(cfg, ctx)
    beginning = resume(state, cfg.model)
    for passed_over in beginning.passed_over:
        journal.event(state.iteration, "fallback", passed_over)
    journal.event(state.iteration, beginning.event, beginning.detail)
    if beginning.is_continued:
        journal.saved = state.iteration
    hooks = agree(lambda: recipe.build_hooks(cfg, state))
    upkeep = Upkeep(
        save=checkpoint_writer(state),
        rewind=rewind,
        evaluate_first=beginning.is_continued and evaluation_is_pending(state),
        journal=journal,
        watchdog=watchdog,
    )
    return train(state, language_model_step, hooks=hooks, upkeep=upkeep)


if __name__ == "__main__":
    sys.exit(main())
