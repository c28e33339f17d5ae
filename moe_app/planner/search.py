"""Searches the legal layouts of a run on N GPUs and estimates their cost."""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from megatron.trainer.config.parallel_layout import (
    Layout,
    num_microbatches,
    resolve_layout,
    resolved_expert_tensor_parallel_size,
    world_size_problems,
)
from megatron.trainer.config.schema import ParallelConfig, TrainingConfig
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from moe_app.pretrain.config import PretrainConfig
from moe_ext.cost.activations import Step
from moe_ext.cost.cluster import Cluster, step_seconds
from moe_ext.cost.device import Device, find_device, flat
from moe_ext.cost.footprint import Footprint, footprint
from moe_ext.cost.traffic import step_collectives
from moe_ext.experts import AUTO, choose_backend, look_up_backend, use_of_model
from moe_ext.layers.products import working_dtype

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class PlanningConfig:
    """Describes the GPUs and the layouts to search."""

    gpus: int | None = None
    """GPUs of the run; has to be given."""
    memory: float | None = None
    """Memory of a GPU in GB (10^9 bytes); None means what the GPU has."""
    headroom: float = 0.1
    """Share of it that stays free for CUDA, NCCL and what the allocator cannot use."""
    imbalance: float = 1.0
    """Assignments of the busiest expert parallel rank over the mean's; 1 is balanced routing."""
    distributed_optimizer: Literal["both", "on", "off"] = "both"
    """Whether optimizer state is sharded, whatever the recipe says."""
    tp: tuple[int, ...] = ()
    """Tensor parallel sizes to look at; none means all that are legal."""
    pp: tuple[int, ...] = ()
    """Pipeline parallel sizes."""
    vp: tuple[int, ...] = ()
    """Virtual stages per pipeline rank."""
    cp: tuple[int, ...] = ()
    """Context parallel sizes."""
    ep: tuple[int, ...] = ()
    """Expert parallel sizes."""
    etp: tuple[int, ...] = ()
    """Expert tensor parallel sizes; none means 1 and the tensor parallel size."""
    rows: int = 12
    """Layouts in the table."""
    paste: int = 3
    """Layouts whose flags are printed."""
    json: str | None = None
    """File that gets all layouts."""
    gpu: str = "h100"
    """GPU by name, h100 or h200, or a file that benchmarks.calibrate has written for another."""
    gpu_tflops: float | None = None
    """One rate of every product instead, and no time for anything else; None means the GPU's."""
    intra_gbps: float = 450.0
    """GB/s one way out of a GPU within its node."""
    inter_gbps: float = 50.0
    """GB/s one way out of a GPU's own network adapter."""
    gpus_per_node: int = 8
    """GPUs of a node, neighbours in rank."""
    latency_us: float = 20.0
    """Of a collective, whatever its size."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PretrainConfig):
    """Describes a pretraining run and the GPUs that it is planned for."""

    planning: PlanningConfig = field(default_factory=PlanningConfig)
    """The GPUs."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Holds a layout and its estimated cost."""

    parallel: ParallelConfig
    """The settings."""
    layout: Layout
    """What they mean."""
    step: Step
    """A rank's step under it."""
    footprint: Footprint
    """The rank that needs most memory."""
    bytes: float
    """That leave a GPU in a step, on the stage that sends most."""
    seconds: float
    """Of a step, estimated."""

    def fits(self, limit: float) -> bool:
        """Return whether the peak is at most `limit` bytes."""
        return self.footprint.peak <= limit


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Holds the result of a search."""

    plans: Sequence[Plan]
    """Those that fit first, then the fastest."""
    num_tried: int
    """Combinations that divide the GPUs."""
    refusals: Counter[str]
    """Why the others are not legal, and how many of them."""


@functools.lru_cache(maxsize=8)
def device_of(planning: PlanningConfig) -> Device:
    """Return the GPU that is planned for.

    Raises:
        ConfigError: it is not known.
    """
    try:
        known = find_device(planning.gpu)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if planning.gpu_tflops is None:
        return known
    return dataclasses.replace(flat(planning.gpu_tflops), memory_gb=known.memory_gb)


def memory_gb(planning: PlanningConfig) -> float:
    """Return the memory of a GPU in GB."""
    return device_of(planning).memory_gb if planning.memory is None else planning.memory


def memory_limit(planning: PlanningConfig) -> float:
    """Return the bytes available for a rank's tensors."""
    return memory_gb(planning) * GB * (1 - planning.headroom)


def search(cfg: PlanConfig, num_gpus: int) -> SearchResult:
    """Estimate the cost of every legal layout on `num_gpus` ranks.

    Raises:
        ConfigError: a setting is wrong under any layout, or no layout is legal.
    """
    plans, refusals, num_tried = [], Counter[str](), 0
    for parallel in _combinations(cfg, num_gpus):
        num_tried += 1
        changed = dataclasses.replace(cfg, parallel=parallel)
        try:
            validate(changed, num_gpus)
        except ConfigError as error:
            refusals[str(error)] += 1
            continue
        plans += _optimizer_variants(changed, num_gpus)
    limit = memory_limit(cfg.planning)
    plans.sort(key=lambda plan: (not plan.fits(limit), _sort_key(plan, limit), plan.footprint.peak))
    return SearchResult(plans=plans, num_tried=num_tried, refusals=refusals)


def _sort_key(plan: Plan, limit: float) -> float:
    """Return the sort key of a plan: its time if it fits, else its peak."""
    return plan.seconds if plan.fits(limit) else plan.footprint.peak


def _optimizer_variants(cfg: PlanConfig, num_gpus: int) -> list[Plan]:
    """Cost a legal layout with each requested optimizer."""
    layout, wanted = resolve_layout(cfg.parallel, num_gpus), cfg.planning.distributed_optimizer
    if wanted == "both" and layout.data * layout.context == layout.expert_data == 1:
        wanted = "off"  # no other rank to shard over
    optimizers = {"both": (False, True), "on": (True,), "off": (False,)}
    return [_cost(cfg, layout, is_sharded=each) for each in optimizers[wanted]]


def _combinations(cfg: PlanConfig, num_gpus: int) -> Iterator[ParallelConfig]:
    """Generate the sizes whose groups divide the ranks; `validate` checks them against the run."""
    planning, divisors = cfg.planning, _divisors(num_gpus)
    has_experts = cfg.model.num_experts is not None
    sizes = itertools.product(
        planning.tp or divisors,
        planning.pp or divisors,
        planning.cp or divisors,
        planning.ep or (divisors if has_experts else [1]),
        planning.vp or _divisors(cfg.model.num_layers),
    )
    for tensor, pipeline, context, expert, virtual in sizes:
        if virtual > 1 and pipeline == 1 and not planning.vp:
            continue
        for expert_tensor in planning.etp or sorted({1, tensor} if has_experts else {tensor}):
            parallel = dataclasses.replace(
                cfg.parallel,
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                num_virtual_stages_per_pipeline_rank=virtual,
                context_parallel_size=context,
                expert_model_parallel_size=expert,
                expert_tensor_parallel_size=expert_tensor,
            )
            if min(tensor, pipeline, context, expert, expert_tensor) < 1 or not (
                world_size_problems(parallel, num_gpus)
            ):
                yield parallel


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _cost(cfg: PlanConfig, layout: Layout, *, is_sharded: bool) -> Plan:
    parallel = dataclasses.replace(cfg.parallel, use_distributed_optimizer=is_sharded)
    planning = cfg.planning
    step = make_step(
        dataclasses.replace(cfg, parallel=parallel),
        layout,
        device_type="cuda",
        imbalance=planning.imbalance if layout.expert > 1 else 1.0,
    )
    try:
        sent = [step_collectives(cfg.model, layout, step, stage=each) for each in _ends(layout)]
        seconds = stage_seconds(cfg, layout, step)
    except ValueError as error:  # a dispatcher of unknown traffic
        raise ConfigError(str(error)) from error
    return Plan(
        parallel=parallel,
        layout=layout,
        step=step,
        footprint=footprint(cfg.model, layout, step),
        bytes=max(sum(each.step_bytes for each in stage) for stage in sent),
        seconds=sum(seconds.values()),
    )


def stage_seconds(cfg: PlanConfig, layout: Layout, step: Step) -> dict[str, float]:
    """Return the terms of a step's time, of the slower of the first and the last stage."""
    cluster = cluster_of(cfg.planning)
    each = [step_seconds(cfg.model, layout, step, cluster, stage=end) for end in _ends(layout)]
    return max(each, key=lambda terms: sum(terms.values()))


def cluster_of(planning: PlanningConfig) -> Cluster:
    """Return the rates that are planned with."""
    return Cluster(
        device=device_of(planning),
        intra_bytes_per_second=planning.intra_gbps * 1e9,
        inter_bytes_per_second=planning.inter_gbps * 1e9,
        gpus_per_node=planning.gpus_per_node,
        latency_s=planning.latency_us * 1e-6,
    )


def _ends(layout: Layout) -> list[int]:
    """Return the first and the last stage."""
    return sorted({0, layout.pipeline - 1})


def make_step(
    cfg: PretrainConfig,
    layout: Layout,
    *,
    device_type: Literal["cpu", "cuda"],
    imbalance: float = 1.0,
) -> Step:
    """Describe a rank's step for the cost model."""
    training, data = cfg.training, cfg.data
    is_selective = training.recompute_granularity == "selective"
    return Step(
        seq_length=training.seq_length,
        micro_batch_size=training.micro_batch_size,
        num_microbatches=num_microbatches(training, layout),
        bf16=training.bf16,
        use_distributed_optimizer=cfg.parallel.use_distributed_optimizer,
        overlap_grad_reduce=cfg.parallel.overlap_grad_reduce,
        overlap_param_gather=cfg.parallel.overlap_param_gather,
        recompute=_recompute(training),
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        recompute_core_attention=is_selective and "core_attn" in training.recompute_modules,
        keeps_activation=_keeps_activation(cfg, device_type),
        fused_kernels=device_type == "cuda" and cfg.model.fused_kernels == "auto",
        converts_bf16=device_type == "cpu" and _upcasts_bf16(),
        has_positions=data.reset_position_ids,
        has_mask=data.reset_attention_mask and data.packed_attention == "mask",
        is_varlen=data.reset_attention_mask and data.packed_attention != "mask",
        imbalance=imbalance,
        device_type=device_type,
    )


def _upcasts_bf16() -> bool:
    """Return whether this machine's CPU multiplies bf16 in fp32."""
    return working_dtype(torch.empty(0, dtype=torch.bfloat16)) != torch.bfloat16


def _recompute(training: TrainingConfig) -> Literal["full", "moe"] | None:
    if training.recompute_granularity == "full":
        return "full"
    is_selective = training.recompute_granularity == "selective"
    return "moe" if is_selective and "moe" in training.recompute_modules else None


def _keeps_activation(cfg: PretrainConfig, device_type: str) -> bool:
    """Return whether the run's expert backend keeps its activation, installed here or not."""
    parallel, name = cfg.parallel, cfg.model.expert_backend
    use = use_of_model(
        cfg.model,
        device_type=device_type,
        dtype=torch.bfloat16 if cfg.training.bf16 else torch.float32,
        tensor=parallel.tensor_model_parallel_size,
        expert_tensor=resolved_expert_tensor_parallel_size(parallel),
    )
    if not use.widths:
        return False
    try:
        is_open = name == AUTO
        backend = choose_backend(name, use).backend if is_open else look_up_backend(name)
        return backend.keeps_activation
    except ValueError as error:
        raise ConfigError(str(error)) from error


def best_per_layout(plans: Sequence[Plan]) -> list[Plan]:
    """Keep the first plan per layout, over virtual stages and optimizers."""
    found: dict[tuple[int, ...], Plan] = {}
    for plan in plans:
        at = plan.layout
        sizes = (at.tensor, at.pipeline, at.context, at.expert, at.expert_tensor)
        found.setdefault(sizes, plan)
    return list(found.values())


def as_dict(plan: Plan, limit: float) -> dict[str, Any]:
    """Convert to JSON values, in bytes and seconds."""
    return {
        "fits": plan.fits(limit),
        "layout": dataclasses.asdict(plan.layout),
        "step": dataclasses.asdict(plan.step),
        "footprint": {**dataclasses.asdict(plan.footprint), "peak": plan.footprint.peak},
        "bytes_per_step": plan.bytes,
        "seconds_per_step": plan.seconds,
    }
