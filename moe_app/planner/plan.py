"""Estimate memory, traffic and time of every legal layout of a run, and print its flags.

Takes the recipe and flags of pretrain.py, and the GPUs: --gpus N --memory GB. Without a batch in
them, that of the preset's publication is planned for; the output says so.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.trainer.config.cli import load_config
from megatron.trainer.config.durations import resolve_lengths
from megatron.trainer.config.schema import ParallelConfig, TrainingConfig
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from megatron.trainer.runtime.launch import run_main
from moe_app.command_line import program
from moe_app.planner.search import (
    GB,
    Plan,
    PlanConfig,
    SearchResult,
    as_dict,
    best_per_layout,
    device_of,
    memory_gb,
    memory_limit,
    search,
)
from moe_ext.counting import count_parameters
from moe_ext.presets import PRESETS, PUBLISHED_STEPS

_STEP = ("seq_length", "global_batch_size")
"""What makes a step, and is not guessed."""
_MORE_GPUS = (2, 4, 8)
"""How many times the GPUs are tried where nothing fits."""


def main(argv: Sequence[str] | None = None) -> int:
    """Plan as `argv` says; returns the exit status."""
    return run_main(lambda: plan(*parse(argv)))


def parse(argv: Sequence[str] | None) -> tuple[PlanConfig, tuple[str, ...]]:
    """Read recipe and flags.

    Returns:
        The settings, and the names of those of the step that are the preset's published ones.

    Raises:
        ConfigError: neither the recipe, the flags nor the preset's publication give a step.
    """
    published: list[str] = []

    def resolve(cfg: PlanConfig, layers: list[frozenset[str]]) -> PlanConfig:
        missing = [name for name in _STEP if not any(name in layer for layer in layers)]
        if missing:
            raise ConfigError(_no_step(missing))
        chosen = layers[1] | layers[2]
        published.extend(name for name in _STEP if name not in chosen)
        return resolve_lengths(cfg, layers)

    cfg = load_config(
        PlanConfig,
        sys.argv[1:] if argv is None else argv,
        presets={name: {**PRESETS[name], **PUBLISHED_STEPS.get(name, {})} for name in PRESETS},
        resolve=resolve,
        prog=program("plan"),
        description=__doc__ or "",
    )
    return cfg, tuple(published)


def _no_step(missing: Sequence[str]) -> str:
    flags = [f"--{name.replace('_', '-')} N" for name in missing]
    return (
        f"{' and '.join(missing)} must be given: memory and time are those of one step, and only"
        f" the presets {', '.join(PUBLISHED_STEPS)} have published ones; set {' and '.join(flags)},"
        " or give the recipe of the run as --config"
    )


def plan(cfg: PlanConfig, published: Sequence[str] = ()) -> None:
    """Print the table and the flags.

    Args:
        cfg: the run and its GPUs.
        published: settings of the step that are the preset's published ones.

    Raises:
        ConfigError: the settings are wrong, no layout is legal, or none fits.
    """
    num_gpus = _check(cfg)
    found = search(cfg, num_gpus)
    limit = memory_limit(cfg.planning)
    if cfg.planning.json is not None:
        _write(cfg, found, Path(cfg.planning.json))
    if not found.plans:
        raise ConfigError(_no_layout(found, num_gpus))
    print("\n".join([*_head(cfg, num_gpus, published), "", *_count(found, limit), ""]))
    best = best_per_layout(found.plans)
    print("\n".join(table(best[: cfg.planning.rows], limit)), flush=True)
    fitting = [each for each in best if each.fits(limit)]
    if not fitting:
        raise ConfigError(_nothing_fits(cfg, found.plans[0], num_gpus))
    for number, each in enumerate(fitting[: cfg.planning.paste], start=1):
        print(f"\nflags of row {number}:")
        print("\n".join(flag_lines(each.parallel)))


def _check(cfg: PlanConfig) -> int:
    """Validate the settings on one rank; returns the number of GPUs.

    Raises:
        ConfigError: they are not.
    """
    planning = cfg.planning
    if planning.gpus is None:
        raise ConfigError("gpus (None) must be given: the GPUs of the run; set --gpus N")
    least: dict[str, tuple[float, float]] = {
        "gpus": (planning.gpus, 1),
        "imbalance": (planning.imbalance, 1),
        "rows": (planning.rows, 1),
        "paste": (planning.paste, 0),
        "gpus_per_node": (planning.gpus_per_node, 1),
        "latency_us": (planning.latency_us, 0),
    }
    found = [
        f"{name} ({value:g}) must be at least {bound:g}; use {bound:g} or more"
        for name, (value, bound) in least.items()
        if value < bound
    ]
    found += [
        f"{name} ({value:g}) must be above 0; use a positive number"
        for name in ("memory", "gpu_tflops", "intra_gbps", "inter_gbps")
        if (value := getattr(planning, name)) is not None and value <= 0
    ]
    if not 0 <= planning.headroom < 1:
        found.append(
            f"headroom ({planning.headroom:g}) must be at least 0 and below 1; use 0.1 for a tenth"
        )
    model = cfg.model
    if model.moe_layer_freq > 1 or model.moe_share_across_layers:
        found.append(
            f"moe_layer_freq ({model.moe_layer_freq}) and moe_share_across_layers"
            f" ({model.moe_share_across_layers}): the planner counts layers that are alike and"
            " share nothing; plan with 1 and False"
        )
    if found:
        raise ConfigError("\n".join(found))
    # A dispatcher may need more ranks than one; the search refuses layouts that it cannot send in.
    model = dataclasses.replace(cfg.model, moe_token_dispatcher_type="alltoall")
    validate(dataclasses.replace(cfg, model=model, parallel=_on_one_rank(cfg.parallel)), 1)
    return planning.gpus


def _on_one_rank(parallel: ParallelConfig) -> ParallelConfig:
    """Return the same settings for one rank."""
    return dataclasses.replace(
        parallel,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        num_virtual_stages_per_pipeline_rank=1,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        sequence_parallel=None,
    )


def _head(cfg: PlanConfig, num_gpus: int, published: Sequence[str]) -> Iterator[str]:
    count, training, planning = count_parameters(cfg.model), cfg.training, cfg.planning
    yield f"model: {count.total:,} parameters, {count.active:,} active per token"
    precision = "bf16 with fp32 master weights" if training.bf16 else "fp32"
    yield (
        f"step: {training.global_batch_size:,} x {training.seq_length:,} tokens, micro-batches of"
        f" {training.micro_batch_size}, {precision}, {_recomputation(training)}"
    )
    if published:
        yield f"{' and '.join(published)}: as published for the preset, not set for this run"
    yield (
        f"machine: {num_gpus:,} GPUs of {memory_gb(planning):g} GB, {planning.headroom:.0%} of it"
        f" kept free; {planning.gpus_per_node} a node; imbalance {planning.imbalance:g}"
    )
    yield f"time: {_gpu(cfg)}; {_overlap(cfg)}"
    yield (
        f"links: {planning.intra_gbps:g} GB/s within a node, {planning.inter_gbps:g} GB/s out of"
        f" it, {planning.latency_us:g} us a call"
    )


def _gpu(cfg: PlanConfig) -> str:
    device = device_of(cfg.planning)
    if not device.layer_ms:
        return device.name
    backend = device.backend(cfg.model.expert_backend)
    return f"{device.name}, experts as '{backend}'"


def _overlap(cfg: PlanConfig) -> str:
    if cfg.parallel.overlap_param_gather:
        return "reductions of gradients and gathers of weights overlap"
    if cfg.parallel.overlap_grad_reduce:
        return "only reductions of gradients overlap"
    return "nothing overlaps"


def _recomputation(training: TrainingConfig) -> str:
    if training.recompute_granularity is None:
        return "no recomputation"
    if training.recompute_granularity == "full":
        return f"recompute full ({training.recompute_method} {training.recompute_num_layers})"
    return f"recompute {', '.join(training.recompute_modules)}"


def _count(found: SearchResult, limit: float) -> Iterator[str]:
    number = sum(each.fits(limit) for each in found.plans)
    legal = found.num_tried - found.refusals.total()
    yield (
        f"{legal:,} legal layouts of {found.num_tried:,} tried; {len(found.plans):,} plans,"
        f" {number:,} fit"
    )
    yield "GB on the GPU that needs most; GB that it sends in a step; seconds of a step"


def table(plans: Sequence[Plan], limit: float) -> Iterator[str]:
    """Format one line per plan, of at most 100 characters."""
    yield (
        "  #   TP PPxV  CP  EP ETP   DP   mb   opt weights  grads  optim  activ   work   peak"
        "     sent   step"
    )
    for number, each in enumerate(plans, start=1):
        layout, found = each.layout, each.footprint
        state = found.state
        stages = f"{layout.pipeline}x{layout.virtual_stages}"
        sizes = (
            state.weights,
            state.gradients,
            state.optimizer,
            found.activations,
            state.buffers + found.workspace,
            found.peak,
        )
        memory = " ".join(f"{size / GB:6.1f}" for size in sizes)
        mark = " " if each.fits(limit) else "!"
        yield (
            f"{number:3} {layout.tensor:4} {stages:>4} {layout.context:3} {layout.expert:3}"
            f" {layout.expert_tensor:3} {layout.data:4} {each.step.num_microbatches:4}"
            f" {'dist' if each.parallel.use_distributed_optimizer else 'full':>5}  {memory}{mark}"
            f" {each.bytes / GB:7.1f} {each.seconds:6.2f}"
        )


def flag_lines(parallel: ParallelConfig) -> Iterator[str]:
    """Format the flags of pretrain.py for this layout; they override the recipe."""
    sizes = {
        "tensor-model-parallel-size": parallel.tensor_model_parallel_size,
        "pipeline-model-parallel-size": parallel.pipeline_model_parallel_size,
        "num-virtual-stages-per-pipeline-rank": parallel.num_virtual_stages_per_pipeline_rank,
        "context-parallel-size": parallel.context_parallel_size,
        "expert-model-parallel-size": parallel.expert_model_parallel_size,
        "expert-tensor-parallel-size": parallel.expert_tensor_parallel_size,
    }
    flags = [f"--{name} {size}" for name, size in sizes.items()]
    is_sharded = parallel.use_distributed_optimizer
    flags.append(f"--{'' if is_sharded else 'no-'}use-distributed-optimizer")
    for start in range(0, len(flags), 2):
        pair = flags[start : start + 2]
        yield "    " + " ".join(pair) + (" \\" if start + 2 < len(flags) else "")


def _no_layout(found: SearchResult, num_gpus: int) -> str:
    reasons = "".join(f"\n- {number} times: {why}" for why, number in found.refusals.most_common(5))
    return (
        f"no layout of {num_gpus} ranks is legal, of {found.num_tried:,} that were tried; change"
        f" the number of GPUs, the batch or the sizes that were asked for:{reasons}"
    )


def _nothing_fits(cfg: PlanConfig, nearest: Plan, num_gpus: int) -> str:
    """Describe the nearest plan and the changes that would make one fit."""
    limit = memory_limit(cfg.planning)
    peak = nearest.footprint.peak
    lines = [
        f"no layout of {num_gpus} GPUs fits into {limit / GB:.1f} GB; the nearest, row 1, needs"
        f" {peak / GB:.1f} GB ({(peak - limit) / GB:.1f} more); tried besides:"
    ]
    helped: set[str] = set()
    for flags, changed, number in _remedies(cfg, num_gpus):
        kind = flags.replace(f"--gpus {number}", "--gpus")
        best = None if kind in helped else next(iter(search(changed, number).plans), None)
        if best is None:
            continue
        does_fit = best.fits(limit)
        helped |= {kind} if does_fit else set()
        verdict = "fits" if does_fit else "still too much"
        lines.append(f"- {flags}: {best.footprint.peak / GB:.1f} GB, {verdict}")
    if not helped:
        lines.append("none of it is enough; use GPUs with more memory, or a smaller model")
    return "\n".join(lines)


def _remedies(cfg: PlanConfig, num_gpus: int) -> Iterator[tuple[str, PlanConfig, int]]:
    """Generate changes to try: flags, resulting settings, number of GPUs."""
    sharded = _replanned(cfg, distributed_optimizer="both")
    if cfg.planning.distributed_optimizer == "off":
        yield "--distributed-optimizer on", sharded, num_gpus
    smaller, flags = sharded, ""
    if cfg.training.micro_batch_size > 1:
        smaller, flags = _retrained(sharded, micro_batch_size=1), "--micro-batch-size 1"
        yield flags, smaller, num_gpus
    granularity = cfg.training.recompute_granularity
    if granularity is None and cfg.model.num_experts is not None:
        moe = _retrained(smaller, recompute_granularity="selective", recompute_modules=("moe",))
        yield f"{flags} --recompute-granularity selective".strip(), moe, num_gpus
    if granularity != "full":
        smaller = _retrained(
            smaller, recompute_granularity="full", recompute_method="uniform",
            recompute_num_layers=1,
        )  # fmt: skip
        flags = f"{flags} --recompute-granularity full".strip()
        yield flags, smaller, num_gpus
    for factor in _MORE_GPUS:
        number = factor * num_gpus
        yield f"--gpus {number}", sharded, number
        if flags:
            yield f"--gpus {number} {flags}", smaller, number


def _replanned(cfg: PlanConfig, **changes: object) -> PlanConfig:
    return dataclasses.replace(cfg, planning=dataclasses.replace(cfg.planning, **changes))  # type: ignore[arg-type]


def _retrained(cfg: PlanConfig, **changes: object) -> PlanConfig:
    return dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, **changes))  # type: ignore[arg-type]


def _write(cfg: PlanConfig, found: SearchResult, path: Path) -> None:
    count, limit = count_parameters(cfg.model), memory_limit(cfg.planning)
    content = {
        "parameters": dataclasses.asdict(count),
        "planning": dataclasses.asdict(cfg.planning),
        "limit_bytes": limit,
        "tried": found.num_tried,
        "plans": [as_dict(each, limit) for each in found.plans],
    }
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write --json {path}: {error.strerror}; give a file in a directory that exists"
        ) from error
