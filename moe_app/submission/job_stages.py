"""Reads the recipe of any stage of training, as the tool that will run it does."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

from megatron.trainer.config.recipe import recipe_nodes, schema_of
from megatron.trainer.config.schedule_lengths import describe_lengths
from megatron.trainer.errors import ConfigError
from moe_app.align.align_config import AlignConfig
from moe_app.chat.chat_files import find_chat_files
from moe_app.finetune.tuning_config import FinetuneConfig, TuningConfig, parse_tuning
from moe_app.pretrain.config import PretrainConfig, parse_recipe

JobStage = Literal["pretrain", "finetune", "align"]
"""Names the tool that trains, tools/STAGE.py."""
STAGES: tuple[JobStage, ...] = get_args(JobStage)


def stage_of(recipe: str, flags: Sequence[str]) -> JobStage:
    """Return the stage whose settings a recipe and flags have.

    Alignment has settings that no other stage has, and it shares others with fine-tuning alone.

    Raises:
        ConfigError: the recipe cannot be read.
    """
    named = {str(key.value) for key, _ in recipe_nodes(recipe)}
    for flag in flags:
        if flag.startswith("--"):
            name = flag[2:].partition("=")[0].replace("-", "_")
            named |= {name, name.removeprefix("no_")}
    texts, tuning = schema_of(TuningConfig).keys(), schema_of(FinetuneConfig).keys()
    if named & (schema_of(AlignConfig).keys() - texts):
        return "align"
    return "finetune" if named & (tuning - schema_of(PretrainConfig).keys()) else "pretrain"


def parse_stage(stage: JobStage, recipe: str, flags: Sequence[str], *, prog: str) -> PretrainConfig:
    """Read and check recipe and flags as the tool of a stage does.

    Of the texts of fine-tuning and alignment it is checked that the files are there. A job that is
    requeued loads its own checkpoint, so an alignment's config names the reference that it has.

    Raises:
        UserError: they are invalid, or no checkpoint or text is where they say.
    """
    argv = ["--config", recipe, *flags]
    if stage == "pretrain":
        return parse_recipe(argv, prog=prog, description="")
    if stage == "finetune":
        tuned = parse_tuning(FinetuneConfig, argv, prog=prog, description="")
        _check_texts(tuned)
        tuned.chat.check("sft")
        return tuned
    cfg = parse_tuning(AlignConfig, argv, prog=prog, description="")
    _check_texts(cfg)
    cfg.chat.check(cfg.kind)
    if cfg.align.reference_load is not None:
        return cfg
    if not cfg.checkpoint.finetune:
        raise ConfigError(
            f"--load {cfg.checkpoint.load} is the run itself, which is no reference; name the model"
            " that it began from with --reference-load"
        )
    step = cfg.align.reference_ckpt_step
    reference = dataclasses.replace(
        cfg.align,
        reference_load=cfg.checkpoint.load,
        reference_ckpt_step=cfg.checkpoint.ckpt_step if step is None else step,
    )
    return dataclasses.replace(cfg, align=reference)


def _check_texts(cfg: TuningConfig) -> None:
    """Look for the files of texts, without reading them."""
    for flag in ("train_data", "valid_data"):
        files = getattr(cfg.chat, flag)
        if files:
            find_chat_files(files, flag=f"--{flag.replace('_', '-')}")


def has_known_length(cfg: PretrainConfig) -> bool:
    """Return whether the steps of a run are known before its texts are tokenized."""
    return not isinstance(cfg, TuningConfig) or cfg.tuning.train_epochs is None


def length_lines(cfg: PretrainConfig) -> list[str]:
    """Describe the length of a run, as far as it is known."""
    if not isinstance(cfg, TuningConfig) or cfg.tuning.train_epochs is None:
        return describe_lengths(cfg)
    return [
        f"length: {cfg.tuning.train_epochs:g} epochs of the training texts; how many steps these"
        " are is known once the job has tokenized them"
    ]
