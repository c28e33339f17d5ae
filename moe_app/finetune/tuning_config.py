"""Defines the settings of the stages after pretraining, which begin from a checkpoint.

The architecture and the tokenizer are the checkpoint's, unless flags or a recipe name others.
"""

import dataclasses
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron.trainer.checkpoint import layout
from megatron.trainer.checkpoint.load import read_text
from megatron.trainer.config.cli import load_config
from megatron.trainer.config.durations import resolve_lengths, with_train_tokens
from megatron.trainer.config.recipe import plain_values, schema_of
from megatron.trainer.config.validate import validate
from megatron.trainer.data.tokenizer_files import TOKENIZER_FILES
from megatron.trainer.errors import ConfigError
from megatron.trainer.objective import Reduction
from megatron.trainer.records.run_dir import CONFIG_NAME
from megatron.trainer.runtime.launch import RunContext, environment_rank
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.pretrain.config import PretrainConfig
from moe_ext.config import MoEModelConfig
from moe_ext.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """Sets the length of a run over a finite set of texts."""

    train_epochs: float | None = None
    """Passes over the training texts, at which the run ends; None leaves it to train_iters. Of the
    two the later of recipe and flags counts."""


@dataclass(frozen=True, kw_only=True)
class TuningConfig(PretrainConfig):
    """Holds the settings that fine-tuning and alignment share."""

    chat: ChatDataConfig = field(default_factory=ChatDataConfig)
    """The texts."""
    tuning: TuningSettings = field(default_factory=TuningSettings)
    """The length."""

    def own_problems(self) -> list[str]:
        """Return what is wrong with the settings of this stage, one message each."""
        found = super().own_problems()
        epochs = self.tuning.train_epochs
        if epochs is not None and epochs <= 0:
            found.append(f"train_epochs ({epochs:g}) must be above 0; use 2, for example")
        if not self.chat.train_data:
            found.append("train_data (empty) must name a file of texts; give --train-data FILE")
        if self.data.data_path or self.data.phases or self.data.mock_data:
            found.append(
                "data_path, phases and mock_data are for pretraining; texts come from train_data;"
                " drop them"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class SFTSettings:
    """Sets the objective of fine-tuning."""

    loss_reduction: Reduction = "token-mean"
    """What the sum of the losses of a global batch is divided by: token-mean by its counted tokens,
    sum by nothing (OLMoE), sample-mean is the mean over texts of each one's mean."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TuningConfig):
    """Holds the settings of a fine-tuning run."""

    sft: SFTSettings = field(default_factory=SFTSettings)
    """The objective."""


C = TypeVar("C", bound=TuningConfig)


def parse_tuning(
    config_class: type[C], argv: Sequence[str] | None, *, prog: str, description: str
) -> C:
    """Read recipe and flags over what the checkpoint of `--load` says; print on rank 0 only.

    Raises:
        ConfigError: the recipe or the checkpoint's config is invalid, or there is none.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)

    def parse(base: dict[str, object], *, quiet: bool, is_first: bool = False) -> C:
        # The first time only looks for the checkpoint; there is nothing to print yet.
        return load_config(
            config_class,
            [each for each in arguments if not (is_first and each == "--print-config")],
            presets=PRESETS,
            resolve=resolve_epochs,
            base=base,
            prog=prog,
            description=description,
            quiet=quiet,
        )

    quiet = environment_rank() != 0
    is_asking = {"-h", "--help"} & set(arguments)
    first = parse({}, quiet=quiet) if is_asking else _parse_quietly(parse)
    if first.checkpoint.load is None:
        raise ConfigError(
            "load (None) must name a checkpoint; these stages begin from a trained model; give"
            " --load DIR: a run's --save directory, or an imported checkpoint"
        )
    cfg = parse(
        checkpoint_values(Path(first.checkpoint.load), first.checkpoint.ckpt_step), quiet=quiet
    )
    return _from_weights(cfg)


def resolve_epochs(cfg: C, layers: Sequence[Collection[str]]) -> C:
    """Set lengths as `resolve_lengths`; of epochs and steps, too, the later layer wins.

    The config of a run has both, which agree.

    Raises:
        ConfigError: flags have both.
    """
    cfg = resolve_lengths(cfg, layers)
    steps = ("train_iters", "train_tokens")
    epochs_at, steps_at = (
        max((number for number, layer in enumerate(layers) if set(names) & set(layer)), default=-1)
        for names in (("train_epochs",), steps)
    )
    if steps_at == epochs_at == len(layers) - 1:
        named = ", ".join(f"--{each.replace('_', '-')}" for each in steps if each in layers[-1])
        raise ConfigError(
            f"--train-epochs {cfg.tuning.train_epochs:g} and {named} are two lengths of one run;"
            " give one of them"
        )
    if steps_at <= epochs_at:
        return cfg if cfg.tuning.train_epochs is None else _with_room(cfg)
    return dataclasses.replace(cfg, tuning=dataclasses.replace(cfg.tuning, train_epochs=None))


def _with_room(cfg: C) -> C:
    """Return the config with steps for its warm-up, until the epochs' own are known."""
    training = cfg.training
    steps = max(training.train_iters, cfg.optimizer.lr_warmup_iters + 1)
    return dataclasses.replace(cfg, training=dataclasses.replace(training, train_iters=steps))


def _parse_quietly(parse: Any) -> Any:
    """Parse once to learn where the checkpoint is; what is wrong is told by the second time."""
    try:
        return parse({}, quiet=True, is_first=True)
    except SystemExit:
        return parse({}, quiet=environment_rank() != 0)


def _from_weights(cfg: C) -> C:
    """Take weights alone from a checkpoint that is not this run's own."""
    flags = cfg.checkpoint
    same = flags.save is not None and Path(flags.save).resolve() == Path(flags.load or "").resolve()
    if same or flags.anneal_from is not None:
        return cfg
    return dataclasses.replace(cfg, checkpoint=dataclasses.replace(flags, finetune=True))


def checkpoint_values(root: Path, iteration: int | None) -> dict[str, object]:
    """Return the settings that a run takes from a checkpoint: its architecture and tokenizer.

    Balancing losses are off, as both papers fine-tune (OLMoE, section 4.3).

    Args:
        root: a run directory.
        iteration: of the checkpoint; None takes the newest.

    Raises:
        ConfigError: there is no checkpoint, or its config cannot be read.
    """
    numbers = layout.final_iterations(root) if root.is_dir() else []
    if not numbers or (iteration is not None and iteration not in numbers):
        what = "no checkpoint" if iteration is None else f"no checkpoint of iteration {iteration}"
        raise ConfigError(f"--load {root} holds {what}; name the --save directory of a run")
    path = layout.final_path(root, max(numbers) if iteration is None else iteration)
    try:
        saved = plain_values(read_text(path, CONFIG_NAME))
    except ValueError as error:
        raise ConfigError(
            f"{path / CONFIG_NAME} is no config: {error}; name another run"
        ) from error
    if not isinstance(saved, dict):
        raise ConfigError(f"{path / CONFIG_NAME} is no config of a run; name another one")
    names = {each.name for each in dataclasses.fields(MoEModelConfig)}
    kept = names | {"tokenizer_type", "eod_token", "bf16"}
    schema = schema_of(PretrainConfig)
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in saved.items()
        if name in kept and name in schema
    }
    tokenizer = _tokenizer_in(path, saved)
    off = {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}
    return {**values, **off, **({} if tokenizer is None else {"tokenizer_model": tokenizer})}


def _tokenizer_in(path: Path, saved: dict[str, Any]) -> str | None:
    """Return the tokenizer that a checkpoint carries; None for none."""
    named = saved.get("tokenizer_model")
    if isinstance(named, str) and (path / Path(named).name).exists():
        return str(path / Path(named).name)
    if any((path / name).is_file() for name in TOKENIZER_FILES.values()):
        return str(path)
    return named if isinstance(named, str) else None


def length_known(cfg: C, num_samples: int, ctx: RunContext) -> C:
    """Return the config as `with_epochs`, and check it again: lengths depend on each other.

    Raises:
        ConfigError: as there, or other settings do not fit the length.
    """
    cfg = with_epochs(cfg, num_samples)
    validate(cfg, ctx.world_size)
    return cfg


def with_epochs(cfg: C, num_samples: int) -> C:
    """Return the config with the length of its epochs in steps and tokens.

    Args:
        cfg: of the run.
        num_samples: sequences of one epoch.

    Raises:
        ConfigError: the epochs are less than one global batch.
    """
    epochs = cfg.tuning.train_epochs
    if epochs is None:
        return cfg
    training = cfg.training
    samples = round(epochs * num_samples)
    if samples < training.global_batch_size:
        raise ConfigError(
            f"--train-epochs {epochs:g} are {samples} sequences, but a step takes"
            f" {training.global_batch_size}; a run has at least one step; lower"
            " --global-batch-size or give more data"
        )
    return with_train_tokens(cfg, samples * training.seq_length)
