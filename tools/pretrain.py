"""Pretrain a mixture-of-experts language model; start it with torchrun, or alone on one device."""

import sys
from collections.abc import Sequence

import recipe

from megatron.trainer.launch import agree, environment_rank, initialize, run_main, shut_down
from megatron.trainer.log import configure_logging
from megatron.trainer.loop import train
from megatron.trainer.resume import checkpoint_writer, resume
from megatron.trainer.step import language_model_step


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe and flags in `argv`; returns the exit status."""
    return run_main(lambda: pretrain(recipe.parse(argv, prog="pretrain.py", description=__doc__)))


def pretrain(cfg: recipe.PretrainConfig) -> None:
    """Train as `cfg` says, from scratch or from a checkpoint."""
    configure_logging(environment_rank())
    ctx = initialize(cfg)
    state = recipe.build_state(cfg, ctx)
    resume(state, cfg.model)
    hooks = agree(lambda: recipe.build_hooks(cfg, state))
    train(state, language_model_step, hooks=hooks, save=checkpoint_writer(state))
    shut_down()


if __name__ == "__main__":
    sys.exit(main())
