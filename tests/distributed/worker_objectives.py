"""Takes one step of each objective under many layouts; one rank of test_objectives.

Usage: worker_objectives.py CASES.json OUT

CASES.json: [{"name": ..., "model": NAME, "flags": [...], "steps": [[objective, is_packed], ...]}].
OUT/NAME.policy.pt and OUT/NAME.reference.pt hold transformers' weights. OUT/CASE.rankR.pt gets for
each step its figures, its gradient norm and this rank's shards of every gradient.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.transformer.module import Float16Module
from torch import nn

from megatron.trainer.config.batch_plan import BatchPlan
from megatron.trainer.data.batch import Batch
from megatron.trainer.data.batch_views import DocumentRule
from megatron.trainer.data.build import DataBundle
from megatron.trainer.data.sampler import Phase
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.objective import Objective, TokenObjective
from megatron.trainer.runtime.launch import environment_rank, initialize, shut_down
from megatron.trainer.runtime.log import configure_logging
from megatron.trainer.state import TrainState
from megatron.trainer.step import train_step
from moe_app.align.preference import DPOObjective, KTOObjective, References
from moe_app.align.reference import LiveReference
from moe_app.chat.dialogue import ChatKind
from moe_app.pretrain.build import OpenedData, build_chunks, build_state
from moe_app.pretrain.trainable import TrainableConfig
from moe_ext.layers.lora import is_adapter
from moe_ext.routers import MoERouter
from tests.distributed.hf_models import adapters, fill, shards, to_native
from tests.distributed.hf_parity_worker import configure
from tests.distributed.preference_texts import SEQUENCE, source_of

KINDS: dict[str, ChatKind] = {"dpo": "preference", "kto": "kto"}


def objective_of(name: str, references: References) -> Objective:
    """Return the objective that a step is to take; a suffix says with what settings."""
    if name.startswith("dpo"):
        return DPOObjective(
            references,
            beta=0.1,
            label_smoothing=0.2 if "smooth" in name else 0.0,
            is_average="average" in name,
        )
    if name.startswith("kto"):
        return KTOObjective(references, beta=0.1, desirable_weight=1.25, undesirable_weight=0.8)
    if name.startswith("aux"):
        return OfTextsAlone() if "alone" in name else TokenObjective()
    return TokenObjective(name)  # type: ignore[arg-type]


def stream_of(kind: ChatKind, *, is_packed: bool) -> SampleStream:
    source = source_of(kind, is_packed=is_packed)
    phases = [Phase(sources=("train",), weights=(1.0,))]
    return SampleStream([source], phases, seq_length=SEQUENCE, seed=3)


class OfTextsAlone(TokenObjective):
    """Takes padding off the ends of rows, before they are handed out."""

    def weigh(self, state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        return super().weigh(state, [_without_padding(batch) for batch in batches])


def _without_padding(batch: Batch) -> Batch:
    assert batch.padding is not None and len(batch.tokens) == 1
    length = int((~batch.padding).sum())
    assert 0 < length < SEQUENCE and not batch.padding[0, :length].any()
    cut: dict[str, Any] = {
        name: each[:, :length]
        for name, each in vars(batch).items()
        if isinstance(each, torch.Tensor) and each.shape == batch.tokens.shape
    }
    return dataclasses.replace(batch, **{**cut, "padding": None})


def set_router_losses(state: TrainState, *, is_on: bool) -> None:
    """Turn the router losses on, with weights at which they show, or off."""
    for module in state.modules:
        for router in module.modules():
            if isinstance(router, MoERouter):
                router.aux_loss_coeff, router.z_loss_coeff = (0.5, 0.1) if is_on else (0.0, 0.0)


def take_step(
    state: TrainState, name: str, references: References, *, is_packed: bool
) -> dict[str, Any]:
    """Take a step, or as many as the name ends with."""
    kind = KINDS.get(name[:3], "sft")
    state.train_data = stream_of(kind, is_packed=is_packed)
    size = 2 if is_packed else 4
    state.plan = dataclasses.replace(state.plan, batches=BatchPlan(full=size, start=size))
    set_router_losses(state, is_on=name.startswith("aux"))
    assert state.metrics is not None
    state.metrics.reset()
    losses = []
    for _ in range(int(name[-1]) if name[-1].isdigit() else 1):
        result = train_step(state, objective_of(name, references))
        assert result.skipped is None, result.skipped
        losses.append(result.loss)
    routing = dict(state.metrics.reduce()) if name.startswith("aux") else {}
    gradients = {
        parameter.data_ptr(): cast(Any, parameter).main_grad
        for module in state.modules
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    parts = []
    for shard in shards(state.modules):
        if shard.data.data_ptr() not in gradients or is_adapter(shard.key):
            continue
        gradient = gradients[shard.data.data_ptr()].view(shard.data.shape).clone()
        while gradient.dim() < len(shard.global_shape):
            gradient = gradient[None]
        parts.append((shard.key, list(shard.global_shape), list(shard.global_offset), gradient))
    metrics = {**result.metrics, **routing, "losses": losses}
    return {"metrics": metrics, "grad_norm": result.grad_norm, "gradients": parts}


def run_case(case: dict[str, Any], out: Path) -> None:
    given = torch.load(out / f"{case['model']}.pt", weights_only=True)
    flags = ["--global-batch-size", "4", "--micro-batch-size", "1", "--train-iters", "2"]
    flags += ["--lr", "1e-30", "--min-lr", "1e-30", "--clip-grad", "0", "--weight-decay", "0"]
    flags += ["--lr-decay-style", "constant", "--adam-eps", "1e-3"]
    flags += ["--moe-aux-loss-coeff", "0", "--moe-z-loss-coeff", "0"]
    cfg = configure({**case, "flags": [*flags, *case["flags"]]}, given, SEQUENCE)
    ctx = initialize(cfg)
    data = DataBundle(stream_of("sft", is_packed=False), {})
    rule = DocumentRule(
        eod=None,
        reset_position_ids=True,
        reset_attention_mask=True,
        is_varlen=cfg.data.packed_attention == "varlen",
    )
    state = build_state(cfg, ctx, OpenedData(bundle=data, documents=rule))
    family = given["config"]["model_type"]
    native = partial(to_native, family, cfg.model, "fused")
    fill(state.modules, native(given["policy"]))
    state.optimizer.reload_model_params()
    if cfg.trainable.lora is not None and ctx.world_size == 1:
        torch.save(adapters(state.modules), out / f"{case['name']}.adapters.pt")
    built = build_chunks(dataclasses.replace(cfg, trainable=TrainableConfig()), ctx, seed=None)
    reference: list[nn.Module] = list(built.chunks)
    fill(reference, native(given["reference"]))
    if cfg.training.bf16:
        reference = [Float16Module(built.config, module) for module in reference]
    found = {
        f"{name} {'packed' if is_packed else 'padded'}": take_step(
            state,
            name,
            LiveReference(chunks=reference, is_average="average" in name),
            is_packed=is_packed,
        )
        for name, is_packed in case["steps"]
    }
    torch.save(found, out / f"{case['name']}.rank{ctx.rank}.pt")
    shut_down(keep_world=True)


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    configure_logging(environment_rank())
    for case in cases:
        run_case(case, out)


if __name__ == "__main__":
    main()
