"""Defines the config of a run: the trainer's groups of settings and a model.

Every tool that trains or loads a model reads it here, so that all mean the same by one recipe.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.trainer.config.cli import load_config
from megatron.trainer.config.durations import resolve_lengths
from megatron.trainer.config.recipe import flatten
from megatron.trainer.config.schema import RunConfig
from megatron.trainer.runtime.launch import environment_rank
from moe_app.pretrain.continued import check_stage
from moe_app.pretrain.trainable import TrainableConfig, check_rates
from moe_ext.config import MoEModelConfig
from moe_ext.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Holds the settings of a pretraining run."""

    model: MoEModelConfig = field(default_factory=MoEModelConfig)
    """The architecture."""
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    """What of it trains."""

    def own_problems(self) -> list[str]:
        """Return what is wrong with what trains, one message each."""
        found = self.trainable.problems(self.model)
        again = self.training.recompute_granularity
        if self.model.moe_share_across_layers and again and self.parallel.overlap_grad_reduce:
            found.append(
                f"overlap_grad_reduce (True) with recompute_granularity ({again}) would reduce the"
                " gradients that layers share (moe_share_across_layers True) after the last layer"
                " alone; drop one of the two"
            )
        return found

    def check_saved(self, saved: Mapping[str, Any], is_continued: bool) -> tuple[str, ...]:
        """Refuse a checkpoint that this run cannot begin with, or go on from.

        Args:
            saved: flat config of the run that wrote it.
            is_continued: whether more than the weights is taken.

        Returns:
            Parts of the names of weights that the checkpoint lacks: adapters that start here.

        Raises:
            CheckpointError: it is of another stage, or of other settings that have to stay.
        """
        if is_continued:
            check_stage(saved, flatten(self))
        lacking = self.trainable.check_saved(saved, is_continued)
        if is_continued and not self.checkpoint.override_schedule:
            check_rates(saved, self.trainable)
        return lacking


OTHER_KEYS = frozenset(
    (
        *("train_data", "valid_data", "template", "train_on", "overlong", "packing"),
        *(
            "max_bad_rows",
            "tokenize_workers",
            "data_cache",
            "messages_key",
            "role_key",
            "content_key",
            "prompt_key",
        ),
        *("chosen_key", "rejected_key", "completion_key", "label_key", "train_epochs"),
        *("loss_reduction", "method", "beta", "label_smoothing", "average_log_prob"),
        *("desirable_weight", "undesirable_weight", "reference_load", "reference_ckpt_step"),
        "reference_cache",
    )
)
"""Names settings of fine-tuning and alignment, which the tools that read a saved config ignore."""


def read_saved_config(path: Path, *, prog: str) -> PretrainConfig:
    """Read the config that a run saved, of pretraining or of a later stage.

    Raises:
        ConfigError: it is invalid.
    """
    return load_config(
        PretrainConfig, ["--config", str(path)], prog=prog, description="", ignored=OTHER_KEYS
    )


def parse_recipe(argv: Sequence[str] | None, *, prog: str, description: str) -> PretrainConfig:
    """Read recipe and flags; print on rank 0 only."""
    return load_config(
        PretrainConfig,
        sys.argv[1:] if argv is None else argv,
        presets=PRESETS,
        resolve=resolve_lengths,
        prog=prog,
        description=description,
        quiet=environment_rank() != 0,
    )
