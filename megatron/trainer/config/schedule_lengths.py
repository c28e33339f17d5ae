"""Computes the lengths of the learning-rate schedule, checks them, and describes all lengths.

A schedule whose lengths are all in steps is a function of the steps done. One with a length in
tokens is a function of the tokens consumed, so that it does not notice another batch; its lengths
in steps count as the tokens of that many steps with the batches that the config describes: of the
run's first steps for the warm-up and the end of the decay, of steps behind a ramp-up for a tail.
"""

from dataclasses import dataclass
from typing import Literal

from megatron.trainer.config.batch_plan import batch_plan
from megatron.trainer.config.durations import (
    length_in_tokens,
    phase_samples,
    run_samples,
    steps_of,
    tokens_of,
    tokens_per_step,
)
from megatron.trainer.config.schema import OptimizerConfig, RunConfig

Unit = Literal["iters", "tokens"]
"""What a schedule is a function of, as the names of its lengths end."""


@dataclass(frozen=True, kw_only=True)
class ScheduleLengths:
    """Holds the lengths of a schedule in one unit."""

    unit: Unit
    """Of all lengths."""
    warmup: int
    """Length of the warm-up."""
    decay_end: int
    """Where the decay ends, from the start of the run."""
    tail: int
    """Length of the tail of WSD, or of a branch."""
    counted: tuple[str, ...] = ()
    """Names of the lengths that are given in steps and counted in tokens."""


def schedule_lengths(cfg: RunConfig) -> ScheduleLengths:
    """Return the lengths of a run's schedule, in tokens if one of those that matter is."""
    optimizer = cfg.optimizer
    of_run = length_in_tokens(cfg) if optimizer.lr_decay_iters is None else None
    end = of_run if optimizer.lr_decay_tokens is None else optimizer.lr_decay_tokens
    tail = optimizer.lr_wsd_decay_tokens
    warmup, fraction = optimizer.lr_warmup_tokens, optimizer.lr_warmup_fraction
    if fraction is not None and end is not None:
        warmup = round(fraction * end)
    steps = _in_steps(cfg)
    tokens = {"lr_warmup_iters": warmup, "lr_decay_iters": end, "lr_wsd_decay_iters": tail}
    used = _used(cfg)
    if not any(tokens[name] is not None for name in used):
        unit: Unit = "iters"
        lengths: dict[str, int] = steps
        counted: tuple[str, ...] = ()
    else:
        unit = "tokens"
        lengths = {
            name: _tokens_of(name, steps[name], cfg) if given is None else given
            for name, given in tokens.items()
        }
        counted = tuple(name for name in used if tokens[name] is None and steps[name])
    return ScheduleLengths(
        unit=unit,
        warmup=lengths["lr_warmup_iters"],
        decay_end=lengths["lr_decay_iters"],
        tail=lengths["lr_wsd_decay_iters"],
        counted=counted,
    )


def _in_steps(cfg: RunConfig) -> dict[str, int]:
    """Return the lengths of the schedule in steps, by name; 0 for a tail that it does not have."""
    return {
        "lr_warmup_iters": cfg.optimizer.lr_warmup_iters,
        "lr_decay_iters": cfg.optimizer.lr_decay_iters or cfg.training.train_iters,
        "lr_wsd_decay_iters": cfg.optimizer.lr_wsd_decay_iters or 0,
    }


def _used(cfg: RunConfig) -> list[str]:
    """Return the names in steps of the lengths that the schedule has."""
    if cfg.checkpoint.anneal_from is not None:
        return ["lr_wsd_decay_iters"]
    style = cfg.optimizer.lr_decay_style
    used = ["lr_warmup_iters"] if cfg.optimizer.lr_warmup_iters else []
    used += ["lr_decay_iters"] if style != "constant" else []
    return used + (["lr_wsd_decay_iters"] if style == "WSD" else [])


def _tokens_of(name: str, steps: int, cfg: RunConfig) -> int:
    """Return the tokens that the length called `name` counts as."""
    if name == "lr_wsd_decay_iters":
        return steps * tokens_per_step(cfg.training)
    return tokens_of(steps, cfg.training)


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


def describe_lengths(cfg: RunConfig) -> list[str]:
    """Format the lengths for the head of the log: what ends when, in steps and in tokens."""
    training, plan = cfg.training, batch_plan(cfg.training)
    start = cfg.checkpoint.anneal_from or 0
    steps, full = training.train_iters - start, tokens_per_step(training)
    tokens = run_samples(cfg) * training.seq_length
    lines = [f"length: {steps:,} steps of {_step_size(cfg)} tokens = {tokens:,} tokens"]
    if start:
        lines[0] += f", after the {start:,} steps of the run it branches from"
    if plan.ramp_samples and not start:
        ramp = steps_of(plan.ramp_samples * training.seq_length, training)
        lines.append(
            f"batch: {plan.start:,} sequences, {plan.increment:,} more each time, {plan.full:,}"
            f" after {plan.ramp_samples:,} sequences = {ramp:,} steps"
        )
    end = length_in_tokens(cfg)
    if end is not None:
        lines.append(
            f"end: with the first step at or past {end:,} tokens, whatever the batch until then"
        )
    lines += _describe_schedule(cfg)
    for phase, count in zip(cfg.data.phases, phase_samples(cfg), strict=True):
        lines.append(
            f"phase {phase.name}: {phase.train_tokens:,} tokens: {count:,} sequences ="
            f" {count * training.seq_length / full:,.6g} steps"
        )
    return lines


def _step_size(cfg: RunConfig) -> str:
    training, full = cfg.training, tokens_per_step(cfg.training)
    if not training.rampup_batch_size or cfg.checkpoint.anneal_from is not None:
        return f"{full:,}"
    return f"{batch_plan(training).start * training.seq_length:,} to {full:,}"


def _describe_schedule(cfg: RunConfig) -> list[str]:
    """List what the learning rate is a function of, and what was converted for it."""
    lengths = schedule_lengths(cfg)
    if lengths.unit == "iters":
        return []
    values = {
        "lr_warmup_iters": lengths.warmup,
        "lr_decay_iters": lengths.decay_end,
        "lr_wsd_decay_iters": lengths.tail,
    }
    told = ", ".join(f"{name.replace('_iters', '_tokens')} {values[name]:,}" for name in _used(cfg))
    lines = [f"learning rate: a function of the tokens consumed: {told}"]
    steps = _in_steps(cfg)
    lines += [
        f"learning rate: {name} {steps[name]:,} counts as {values[name]:,} tokens, the batch being"
        f" {_step_size(cfg)} tokens, because another length is in tokens"
        for name in lengths.counted
    ]
    return lines
