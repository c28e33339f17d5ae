"""Computes the length of a run, of its phases and branches, in steps and tokens.

A length in tokens ends at that many consumed tokens, whatever the batches on the way (`run_plan`);
a length in steps is that many steps. A config holds both: `resolve_lengths` sets the number of
steps of each length in tokens with the batches that the config describes, and `length_problems`
checks that both agree, wherever a config comes from.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from megatron.trainer.config.batch_plan import BatchPlan, RunPlan, batch_plan, is_sound
from megatron.trainer.config.schema import DataConfig, RunConfig, TrainingConfig

C = TypeVar("C", bound=RunConfig)

SPELLINGS = {
    "train_iters": ("training", "train_tokens"),
    "lr_warmup_iters": ("optimizer", "lr_warmup_tokens"),
    "lr_decay_iters": ("optimizer", "lr_decay_tokens"),
    "lr_wsd_decay_iters": ("optimizer", "lr_wsd_decay_tokens"),
}
"""Maps a length in steps to its group and to the name of the same length in tokens."""

_BATCH = ("global_batch_size", "seq_length", "rampup_batch_size")
"""Names the settings that determine the tokens of a step."""

_END = (
    *_BATCH,
    *("train_iters", "train_tokens", "phases", "data_path", "mock_data", "anneal_from"),
    *("lr_decay_iters", "lr_decay_tokens"),
)
"""Names the settings that determine the end of the learning rate's decay."""


def tokens_per_step(training: TrainingConfig) -> int:
    """Return the number of tokens in a global batch, once a ramp-up is over."""
    return training.global_batch_size * training.seq_length


def steps_of(tokens: int, training: TrainingConfig) -> int:
    """Return the number of a run's first steps that cover `tokens`, rounded up."""
    return batch_plan(training).steps_until(-(-tokens // training.seq_length))


def tokens_of(steps: int, training: TrainingConfig) -> int:
    """Return the tokens of a run's first steps."""
    return batch_plan(training).samples_after(steps) * training.seq_length


def _steps_of(name: str, tokens: int, training: TrainingConfig) -> int:
    """Return the steps of the length called `name`; a tail lies behind the ramp-up."""
    if name == "lr_wsd_decay_iters":
        return -(-tokens // tokens_per_step(training))
    return steps_of(tokens, training)


def phase_steps(cfg: RunConfig) -> list[int]:
    """Return the number of steps of each phase, as if each began with a step of its own."""
    return [-(-phase.train_tokens // tokens_per_step(cfg.training)) for phase in cfg.data.phases]


def phase_samples(cfg: RunConfig) -> list[int]:
    """Return the number of samples of each phase."""
    return [-(-phase.train_tokens // cfg.training.seq_length) for phase in cfg.data.phases]


def length_in_tokens(cfg: RunConfig) -> int | None:
    """Return the tokens of the run, or of a branch without its trunk; None: it counts steps."""
    if cfg.data.phases and not cfg.data.mock_data:
        return sum(phase_samples(cfg)) * cfg.training.seq_length
    if cfg.checkpoint.anneal_from is not None:
        return cfg.optimizer.lr_wsd_decay_tokens
    return cfg.training.train_tokens


def run_plan(cfg: RunConfig) -> RunPlan:
    """Return what says which step is the last one."""
    tokens = length_in_tokens(cfg)
    return RunPlan(
        batches=batch_plan(cfg.training),
        train_iters=cfg.training.train_iters,
        samples=None if tokens is None else -(-tokens // cfg.training.seq_length),
    )


def run_samples(cfg: RunConfig) -> int:
    """Return the samples that the steps of the run take, or of a branch without its trunk."""
    steps = cfg.training.train_iters - (cfg.checkpoint.anneal_from or 0)
    return _own_plan(cfg).samples_after(steps)


def resolve_lengths(cfg: C, layers: Sequence[Collection[str]]) -> C:
    """Set every length in steps; of two spellings the one in the later layer wins.

    Args:
        cfg: the config with all layers applied.
        layers: the names that each layer sets to a value other than None, from preset to flags.

    Returns:
        The config with train_iters and the lengths of the schedule in steps. Lengths in tokens are
        kept where they won, else None, and so is lr_warmup_fraction. Of data_path and phases the
        one in the later layer is kept. Two spellings in one layer are left to `length_problems`,
        unless a later layer changes the batch: steps that were counted with another one give way.
    """
    data = cfg.data
    if _rank("phases", layers) < _rank("data_path", layers):
        data = dataclasses.replace(data, phases=())
    elif _rank("phases", layers) > _rank("data_path", layers):
        data = dataclasses.replace(data, data_path=())
    cfg = dataclasses.replace(cfg, data=data)
    if not is_sound(cfg.training) or any(phase.train_tokens < 1 for phase in data.phases):
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
    warmup = _warmup_of_fraction(cfg, layers)
    return dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, **warmup))


def _one_spelling(
    cfg: RunConfig, layers: Sequence[Collection[str]], steps: str, group: str, tokens: str
) -> dict[str, Any]:
    value = getattr(getattr(cfg, group), tokens)
    if value is None or value < 1:
        return {}
    given = _rank(tokens, layers)
    if _rank(steps, layers) > given:
        return {tokens: None}
    if _rank(steps, layers) < given or _last_rank(_BATCH, layers) > given:
        return {steps: _steps_of(steps, value, cfg.training)}
    return {}


def _warmup_of_fraction(cfg: RunConfig, layers: Sequence[Collection[str]]) -> dict[str, Any]:
    fraction = cfg.optimizer.lr_warmup_fraction
    if fraction is None or not 0 <= fraction < 1:
        return {}
    given = _rank("lr_warmup_fraction", layers)
    other = _last_rank(("lr_warmup_iters", "lr_warmup_tokens"), layers)
    if other > given:
        return {"lr_warmup_fraction": None}
    if other < given or _last_rank(_END, layers) > given:
        return {"lr_warmup_iters": _fraction_steps(cfg, fraction), "lr_warmup_tokens": None}
    return {}


def with_train_tokens(cfg: C, tokens: int) -> C:
    """Return the config of a run of so many tokens, whose warm-up may be a fraction of it."""
    steps = steps_of(tokens, cfg.training)
    training = dataclasses.replace(cfg.training, train_tokens=tokens, train_iters=steps)
    cfg = dataclasses.replace(cfg, training=training)
    fraction = cfg.optimizer.lr_warmup_fraction
    if fraction is None:
        return cfg
    optimizer = dataclasses.replace(
        cfg.optimizer, lr_warmup_iters=_fraction_steps(cfg, fraction), lr_warmup_tokens=None
    )
    return dataclasses.replace(cfg, optimizer=optimizer)


def _fraction_steps(cfg: RunConfig, fraction: float) -> int:
    return round(fraction * (cfg.optimizer.lr_decay_iters or cfg.training.train_iters))


def _implied_length(cfg: RunConfig, layers: Sequence[Collection[str]]) -> int | None:
    """Return the length that a branch or phases imply, unless set in the same or a later layer."""
    tail = cfg.optimizer.lr_wsd_decay_iters
    explicit = _last_rank(("train_iters", "train_tokens"), layers)
    # Steps counted with another batch than the run's are no length of their own.
    least = explicit if _last_rank(_BATCH, layers) > explicit else explicit + 1
    if cfg.checkpoint.anneal_from is not None:
        is_last = _rank("anneal_from", layers) >= least
        return cfg.checkpoint.anneal_from + tail if tail is not None and is_last else None
    is_last = not cfg.data.mock_data and _rank("phases", layers) >= least
    if cfg.data.phases and (is_last or explicit < 0):
        return _own_plan(cfg).steps_until(sum(phase_samples(cfg)))
    return None


def _own_plan(cfg: RunConfig) -> BatchPlan:
    """Return the batches from the begin of the run, or of a branch, which lies behind a ramp-up."""
    full = cfg.training.global_batch_size
    is_branch = cfg.checkpoint.anneal_from is not None
    return BatchPlan(full=full, start=full) if is_branch else batch_plan(cfg.training)


def _last_rank(names: Collection[str], layers: Sequence[Collection[str]]) -> int:
    """Return the number of the last layer that sets any of the names, -1 if none does."""
    return max(_rank(name, layers) for name in names)


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
        elif _steps_of(steps, given, cfg.training) != counted:
            found.append(
                f"{tokens} ({given:,}) is {_steps_of(steps, given, cfg.training):,} steps of"
                f" global_batch_size x seq_length = {size:,} tokens, but {steps} is {counted}; they"
                " are two spellings of one length; set one of them"
            )
    found += _fraction_problems(cfg) + _branch_length_problems(cfg)
    return found + phase_problems(cfg.data, cfg)


def _fraction_problems(cfg: RunConfig) -> list[str]:
    optimizer = cfg.optimizer
    fraction, steps = optimizer.lr_warmup_fraction, optimizer.lr_warmup_iters
    if fraction is None or cfg.checkpoint.anneal_from is not None:
        return []
    if not 0 <= fraction < 1:
        return [
            f"lr_warmup_fraction ({fraction}) must be at least 0 and below 1, a fraction of the"
            " steps until the decay ends; use 0.01, for example"
        ]
    if optimizer.lr_warmup_tokens is not None:
        other = f"lr_warmup_tokens is {optimizer.lr_warmup_tokens:,}"
    elif steps != _fraction_steps(cfg, fraction):
        other = f"lr_warmup_iters is {steps}"
    else:
        return []
    end = "train_iters" if optimizer.lr_decay_iters is None else "lr_decay_iters"
    return [
        f"lr_warmup_fraction ({fraction}) is {_fraction_steps(cfg, fraction):,} steps of {end}"
        f" ({optimizer.lr_decay_iters or cfg.training.train_iters:,}), but {other}; they are two"
        " spellings of one length; set one of them"
    ]


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
    # A step may have samples of two phases; so a run has fewer steps than its phases by themselves.
    fewest = _own_plan(cfg).steps_until(sum(phase_samples(cfg)))
    if min(fewest, sum(steps)) <= length <= max(fewest, sum(steps)):
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
