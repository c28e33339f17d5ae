"""Computes the length of a run and of its schedule, phases and branches, in steps and tokens.

The training loop counts steps. Lengths in tokens are an alternative spelling, rounded up to whole
steps of global_batch_size x seq_length tokens. `resolve_lengths` converts them once, after a config
is read; `length_problems` checks that both agree, wherever a config comes from.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from megatron.trainer.config.schema import DataConfig, OptimizerConfig, RunConfig, TrainingConfig

C = TypeVar("C", bound=RunConfig)

SPELLINGS = {
    "train_iters": ("training", "train_tokens"),
    "lr_warmup_iters": ("optimizer", "lr_warmup_tokens"),
    "lr_decay_iters": ("optimizer", "lr_decay_tokens"),
    "lr_wsd_decay_iters": ("optimizer", "lr_wsd_decay_tokens"),
}
"""Maps a length in steps to its group and to the name of the same length in tokens."""


def tokens_per_step(training: TrainingConfig) -> int:
    """Return the number of tokens in a global batch."""
    return training.global_batch_size * training.seq_length


def steps_of(tokens: int, training: TrainingConfig) -> int:
    """Return the number of steps that cover `tokens`, rounded up."""
    return -(-tokens // tokens_per_step(training))


def phase_steps(cfg: RunConfig) -> list[int]:
    """Return the number of steps of each phase."""
    return [steps_of(phase.train_tokens, cfg.training) for phase in cfg.data.phases]


def resolve_lengths(cfg: C, layers: Sequence[Collection[str]]) -> C:
    """Set every length in steps; of two spellings the one in the later layer wins.

    Args:
        cfg: the config with all layers applied.
        layers: the names that each layer sets to a value other than None, from preset to flags.

    Returns:
        The config with train_iters and the lengths of the schedule in steps. Lengths in tokens are
        kept where they won, else None. Of data_path and phases the one in the later layer is kept.
        Two spellings in one layer are left to `length_problems`.
    """
    data = cfg.data
    if _rank("phases", layers) < _rank("data_path", layers):
        data = dataclasses.replace(data, phases=())
    elif _rank("phases", layers) > _rank("data_path", layers):
        data = dataclasses.replace(data, data_path=())
    cfg = dataclasses.replace(cfg, data=data)
    if tokens_per_step(cfg.training) < 1 or any(phase.train_tokens < 1 for phase in data.phases):
        return cfg  # `validate` reports it
    for steps, (group, tokens) in SPELLINGS.items():
        changes = _one_spelling(cfg, layers, steps, group, tokens)
        cfg = dataclasses.replace(
            cfg, **{group: dataclasses.replace(getattr(cfg, group), **changes)}
        )
    length = _implied_length(cfg, layers)
    if length is not None:
        training = dataclasses.replace(cfg.training, train_iters=length, train_tokens=None)
        cfg = dataclasses.replace(cfg, training=training)
    return cfg


def _one_spelling(
    cfg: RunConfig, layers: Sequence[Collection[str]], steps: str, group: str, tokens: str
) -> dict[str, Any]:
    value = getattr(getattr(cfg, group), tokens)
    if value is None or value < 1:
        return {}
    if _rank(steps, layers) > _rank(tokens, layers):
        return {tokens: None}
    if _rank(steps, layers) < _rank(tokens, layers):
        return {steps: steps_of(value, cfg.training)}
    return {}


def _implied_length(cfg: RunConfig, layers: Sequence[Collection[str]]) -> int | None:
    """Return the length that a branch or phases imply, unless set in the same or a later layer."""
    tail = cfg.optimizer.lr_wsd_decay_iters
    explicit = max(_rank("train_iters", layers), _rank("train_tokens", layers))
    if cfg.checkpoint.anneal_from is not None:
        is_last = _rank("anneal_from", layers) > explicit
        return cfg.checkpoint.anneal_from + tail if tail is not None and is_last else None
    if cfg.data.phases and not cfg.data.mock_data and _rank("phases", layers) > explicit:
        return sum(phase_steps(cfg))
    if cfg.data.phases and explicit < 0:
        return sum(phase_steps(cfg))
    return None


def _rank(name: str, layers: Sequence[Collection[str]]) -> int:
    """Return the number of the last layer that sets a name, -1 if none does."""
    return max((number for number, layer in enumerate(layers) if name in layer), default=-1)


def length_problems(cfg: RunConfig) -> list[str]:
    """List the lengths that contradict each other; needs batch and sequence of at least 1."""
    size = tokens_per_step(cfg.training)
    found = []
    for steps, (group, tokens) in SPELLINGS.items():
        given = getattr(getattr(cfg, group), tokens)
        counted = getattr(getattr(cfg, group), steps)
        if given is None:
            continue
        if given < 1:
            found.append(f"{tokens} ({given:,}) must be at least 1; use 1 or more")
        elif steps_of(given, cfg.training) != counted:
            found.append(
                f"{tokens} ({given:,}) is {steps_of(given, cfg.training):,} steps of"
                f" global_batch_size x seq_length = {size:,} tokens, but {steps} is {counted}; they"
                " are two spellings of one length; set one of them"
            )
    return found + _branch_length_problems(cfg) + phase_problems(cfg.data, cfg)


def _branch_length_problems(cfg: RunConfig) -> list[str]:
    start, tail = cfg.checkpoint.anneal_from, cfg.optimizer.lr_wsd_decay_iters
    length = cfg.training.train_iters
    if start is None or tail is None or start + tail == length:
        return []
    return [
        f"train_iters ({length:,}) must be anneal_from + lr_wsd_decay_iters ({start:,} +"
        f" {tail:,} = {start + tail:,}), because a branch ends with its tail; leave --train-iters"
        " out"
    ]


def phase_problems(data: DataConfig, cfg: RunConfig) -> list[str]:
    """List the problems of the phases that can be found without reading their files."""
    if not data.phases:
        return []
    found = []
    if data.data_path:
        found.append(
            f"phases ({', '.join(phase.name for phase in data.phases)}) and data_path"
            f" ({' '.join(data.data_path)}) are both set; a run has either; give each phase its"
            " data_path and drop the other"
        )
    names = [phase.name for phase in data.phases]
    for name in dict.fromkeys(names):
        if not name or names.count(name) > 1:
            found.append(
                f"phases have the names {', '.join(map(repr, names))}; each must have one of its"
                " own; rename them"
            )
            break
    for phase in data.phases:
        if phase.train_tokens < 1:
            found.append(
                f"train_tokens ({phase.train_tokens}) of phase {phase.name!r} must be at least 1;"
                " give it tokens, or leave the phase out"
            )
        if not phase.data_path:
            found.append(
                f"data_path of phase {phase.name!r} is empty; a phase needs a source; name a token"
                " file's PREFIX, or WEIGHT PREFIX pairs"
            )
    if not found and not data.mock_data:
        found += _cover_problems(cfg)
    return found


def _cover_problems(cfg: RunConfig) -> list[str]:
    """Check that the phases' steps add up to those of the run, or of the branch."""
    start = cfg.checkpoint.anneal_from or 0
    steps, length = phase_steps(cfg), cfg.training.train_iters - start
    if sum(steps) == length:
        return []
    parts = " + ".join(
        f"{phase.name} {count:,}" for phase, count in zip(cfg.data.phases, steps, strict=True)
    )
    what = f"train_iters ({length:,}) is the length of the run"
    remedy = "change a phase's train_tokens, or leave the length to the phases"
    if start:
        what = f"lr_wsd_decay_iters ({length:,}) is the length of the branch"
        remedy = "give the branch its own phases, or one mixture with --data-path"
    return [
        f"the phases have {sum(steps):,} steps ({parts}, of"
        f" {tokens_per_step(cfg.training):,} tokens each), but {what}; they must cover it exactly;"
        f" {remedy}"
    ]


def schedule_problems(optimizer: OptimizerConfig, cfg: RunConfig) -> list[str]:
    """List the problems in the numbers of the learning-rate schedule."""
    is_branch = cfg.checkpoint.anneal_from is not None
    found = []
    bounds = [("lr_warmup_init", optimizer.lr_warmup_init)]
    if optimizer.lr_decay_style != "constant" or is_branch:
        bounds.append(("min_lr", optimizer.min_lr))
    for name, value in bounds:
        if not 0 <= value <= optimizer.lr:
            found.append(
                f"{name} ({value}) must be at least 0 and at most lr ({optimizer.lr}); lower"
                f" {name}, or raise lr"
            )
    tail = optimizer.lr_wsd_decay_iters
    if is_branch:
        return found + _tail_problems(optimizer)
    if tail is not None and tail < 1:
        found.append(f"lr_wsd_decay_iters ({tail}) must be at least 1; use 1 or more")
    warmup, decay = optimizer.lr_warmup_iters, optimizer.lr_decay_iters
    if warmup < 0:
        found.append(f"lr_warmup_iters ({warmup}) must be at least 0; use 0 or more")
    end_name, end = "lr_decay_iters", decay
    if end is None:
        end_name, end = "train_iters", cfg.training.train_iters
    if warmup >= end:
        found.append(
            f"lr_warmup_iters ({warmup}) must be below {end_name} ({end}), the step at which the"
            f" decay ends; use fewer warm-up steps, or raise {end_name}"
        )
    return found


def _tail_problems(optimizer: OptimizerConfig) -> list[str]:
    tail = optimizer.lr_wsd_decay_iters
    found = []
    if optimizer.lr_wsd_decay_style is None:
        found.append(
            "anneal_from needs lr_wsd_decay_style (None), the shape of the branch's tail; use"
            " linear or geometric, for example"
        )
    if tail is None or tail < 1:
        found.append(
            f"anneal_from needs lr_wsd_decay_iters ({tail}) of at least 1, the length of the"
            " branch; give it in steps, or in tokens as lr_wsd_decay_tokens"
        )
    return found


def branch_problems(cfg: RunConfig) -> list[str]:
    """List what prevents `anneal_from` from naming a checkpoint to branch from."""
    checkpoint = cfg.checkpoint
    start = checkpoint.anneal_from
    if start is None:
        return []
    found = []
    if start < 0:
        found.append(f"anneal_from ({start}) must be at least 0; use an iteration of the trunk")
    if checkpoint.load is None:
        found.append(
            f"anneal_from ({start}) needs load (None), the directory of the run to branch from; set"
            " --load DIR"
        )
    if checkpoint.finetune:
        found.append(
            f"anneal_from ({start}) takes optimizer and learning rate with the weights, finetune"
            " (True) takes the weights alone; drop one of them"
        )
    return found


def describe_lengths(cfg: RunConfig) -> list[str]:
    """Format the lengths for the head of the log, those given in tokens also in steps."""
    size = tokens_per_step(cfg.training)
    start = cfg.checkpoint.anneal_from or 0
    steps = cfg.training.train_iters - start
    lines = [f"length: {steps:,} steps of {size:,} tokens = {steps * size:,} tokens"]
    if start:
        lines[0] += f", after the {start:,} steps of the run it branches from"
    for name, (group, tokens) in SPELLINGS.items():
        given = getattr(getattr(cfg, group), tokens)
        if given is not None:
            count = getattr(getattr(cfg, group), name)
            lines.append(f"{tokens} {given:,}: {count:,} steps = {count * size:,} tokens")
    for phase, count in zip(cfg.data.phases, phase_steps(cfg), strict=True):
        lines.append(
            f"phase {phase.name}: {phase.train_tokens:,} tokens: {count:,} steps ="
            f" {count * size:,} tokens"
        )
    return lines
