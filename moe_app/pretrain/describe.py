"""Describes a run before it starts: model, layout, losses, data."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron.trainer.config.durations import run_samples
from megatron.trainer.config.schema import RunConfig
from megatron.trainer.data.batch_views import DocumentRule
from megatron.trainer.data.build import DataBundle
from megatron.trainer.data.describe import describe, repeated_sources
from megatron.trainer.runtime.launch import RunContext
from moe_app.pretrain.config import PretrainConfig
from moe_ext.attention.packed import way_of
from moe_ext.config import MoEModelConfig
from moe_ext.counting import count_parameters
from moe_ext.experts import BackendChoice
from moe_ext.functional import layer_coefficients
from moe_ext.kernels import fused


def describe_run(cfg: PretrainConfig, ctx: RunContext, backend: BackendChoice | None) -> list[str]:
    """List the head of the log: what is trained, how it is laid out, what the losses mean.

    Args:
        cfg: the run.
        ctx: its ranks and device.
        backend: that the model was built with.
    """
    model, layout = cfg.model, ctx.layout
    count = count_parameters(model)
    lines = [
        f"model: {count.total:,} parameters, {count.active:,} active per token",
        f"layout: {ctx.world_size} ranks on {ctx.device.type}, TP {layout.tensor}, PP"
        f" {layout.pipeline} x {layout.virtual_stages}, CP {layout.context}, EP {layout.expert},"
        f" ETP {layout.expert_tensor}, DP {layout.data}; {ctx.num_threads} threads per rank;"
        f" {'bf16 with fp32 master weights' if cfg.training.bf16 else 'fp32'}",
    ]
    if layout.sequence_parallel and cfg.parallel.sequence_parallel is None:
        lines.append(
            "sequence parallelism is on: megatron-core's experts need it under tensor parallelism"
        )
    if backend is not None:
        lines.append(f"expert backend: {backend.name}, {backend.reason}")
    if ctx.device.type != "cpu":
        lines.append(fused.describe(model.fused_kernels, ctx.device.type))
    if model.num_experts is not None:
        lines += [
            f"experts: {model.num_experts} per layer, {model.moe_router_topk} per token, router"
            f" {model.router}, dispatcher"
            f" {model.moe_token_dispatcher_type}",
            *_describe_losses(model, topk=model.moe_router_topk, num_layers=model.num_moe_layers),
            *_describe_balance(model),
        ]
    if model.attention_experts is not None:
        lines += [
            f"attention experts: {model.attention_experts} per layer, {model.attention_topk} per"
            f" token, router {model.router}; logged as moa_...",
            *_describe_losses(
                model,
                topk=model.attention_topk,
                num_layers=model.num_layers,
                routers="attention ",
            ),
        ]
    return lines


def _describe_balance(model: MoEModelConfig) -> list[str]:
    """Describe what of the routing differs from OLMoE's; docs/routing.md defines it."""
    found = []
    if model.moe_router_load_balancing_type != "aux_loss":
        found.append(f"balance: the loss is {model.moe_router_load_balancing_type}")
    if model.moe_router_enable_expert_bias:
        found.append(
            "balance: biases select experts, and move by"
            f" {model.moe_router_bias_update_rate:g} after each step"
        )
    if model.moe_expert_capacity_factor is not None:
        found.append(
            f"balance: in training experts take {model.moe_expert_capacity_factor:g} times the"
            f" mean load at most, and drop the rest by {model.moe_token_drop_policy}"
        )
    if model.is_expert_choice:
        found.append(
            "routing: experts choose tokens, which is not causal: losses are of a model that sees"
            " later tokens, and it cannot generate text"
        )
    return found


def _describe_losses(
    model: MoEModelConfig, *, topk: int, num_layers: int, routers: str = ""
) -> list[str]:
    """Describe the loss coefficients of the routers that choose `topk` experts."""
    balance, z = layer_coefficients(
        model.moe_loss_convention,
        model.moe_aux_loss_coeff,
        model.moe_z_loss_coeff,
        num_layers=num_layers,
        topk=topk,
    )
    return [
        f"{routers}load-balancing loss: coefficient {model.moe_aux_loss_coeff:g} in the"
        f" '{model.moe_loss_convention}' convention = {balance:g} for each layer's loss;"
        " logged without it, mean over layers, 1.0 = balanced",
        f"{routers}router z-loss: coefficient {model.moe_z_loss_coeff:g} in the"
        f" '{model.moe_loss_convention}' convention = {z:g} for each layer's loss; logged"
        " without it, mean over layers and tokens of logsumexp squared",
    ]


def describe_documents(
    cfg: PretrainConfig, ctx: RunContext, rule: DocumentRule | None
) -> list[str]:
    """Return a line that says how attention keeps documents apart, where it does."""
    if rule is None or not rule.reset_attention_mask:
        return []
    way = "a mask of s x s entries"
    if rule.is_varlen:
        dtype = torch.bfloat16 if cfg.training.bf16 else torch.float32
        found = way_of(ctx.device, dtype, cfg.model.head_size, ctx.layout.context)
        way = f"variable-length attention, {found}"
    return [f"attention: documents of a sequence are kept apart by {way} (--packed-attention)"]


def data_lines(cfg: RunConfig, data: DataBundle) -> tuple[list[str], list[str]]:
    """Return the table of phases and sources, and a warning for each source that is repeated."""
    rows = describe(data, train_samples=run_samples(cfg))
    return data_table(rows, seq_length=cfg.training.seq_length), repeated_sources(rows)


def data_table(rows: Sequence[dict[str, Any]], *, seq_length: int) -> list[str]:
    """Format one line per phase and token source, without numbers that the source does not know."""
    formats = {
        "weight": "weight {:.3g}",
        "documents": "{:,} documents",
        "tokens": "{:,} tokens",
        "windows": "{:,} sequences",
        "drawn": "{:,.0f} tokens to be drawn",
        "epochs": "{:.3g} epochs",
    }
    lines = []
    for row in rows:
        drawn = None if row["draw"] is None else row["draw"] * seq_length
        cells = {**row, "drawn": drawn}
        known = [text.format(cells[key]) for key, text in formats.items() if cells[key] is not None]
        where = "" if row["phase"] is None else f"{row['phase']}, "
        lines.append(
            f"{row['use']} data {where}{row['source']}: {', '.join(known) or 'random tokens'}"
        )
    return lines
