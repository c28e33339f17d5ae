"""Compares a fixed batch's routing with an earlier checkpoint's, at each evaluation."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.trainer.checkpoint import FoundCheckpoint, find_checkpoint
from megatron.trainer.checkpoint.saved_run import check_architecture, saved_config
from megatron.trainer.errors import ConfigError
from megatron.trainer.hooks.base import Hook
from megatron.trainer.objective import Objective
from megatron.trainer.records.record_file import Record, append_record, keep_records_until
from megatron.trainer.records.run_dir import SATURATION_NAME
from megatron.trainer.resume import load_weights
from megatron.trainer.runtime.collective import on_rank0
from megatron.trainer.state import TrainState
from megatron.trainer.step import observe
from moe_ext.analysis.model_routers import RouterId, find_routers
from moe_ext.analysis.ordering import by_gate
from moe_ext.analysis.saturation import Saturation
from moe_ext.config import MoEModelConfig
from moe_ext.functional import Routing
from moe_ext.metrics import MOA, MOE

logger = logging.getLogger("pretrain")

Choices = Mapping[RouterId, np.ndarray]
"""[t, k] experts of this rank's tokens, by router."""


class RouterSaturation(Hook):
    """Records how many of a probe batch's experts are those that a checkpoint chose.

    On every rank: each compares its own tokens and layers, and counts are added up. Between
    evaluations it does nothing. The checkpoint's weights are read once, in place of the run's,
    which are put back as they were.

    Args:
        state: of the run, ready to train; the probe is the first global batch of its first
            validation set.
        model: the architecture.
        objective: of the run.

    Raises:
        ConfigError: the model has no experts, or the run no validation set.
        CheckpointError: the checkpoint is not valid, or of another architecture.
    """

    def __init__(self, state: TrainState, model: MoEModelConfig, objective: Objective) -> None:
        self._state = state
        self._objective = objective
        self._sizes = _router_sizes(model)
        self._num_layers = model.num_layers
        self._probe = _first_batch(state)
        self._file = _record_file(state)
        found = _find(str(state.cfg.logging.log_router_saturation))
        lacking = on_rank0(
            f"reading the configuration in {found.path}",
            lambda: _check(found, model, state),
        )
        self._source = str(found.path)
        self._reference = self._choices_of(found, lacking)
        logger.info("router saturation: against %s, at each evaluation", found.path)

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Drop records of steps that a resumed run will take again."""
        self._keep_until(iteration)

    def on_rewind(self, iteration: int) -> None:
        """Drop records of steps that are taken again."""
        self._keep_until(iteration)

    def on_evaluation(self, record: Record) -> None:
        """Compare the routing, and append a record; a collective call."""
        found = self._compare(self._choose())
        if self._state.ctx.rank != 0:
            return
        parts = []
        for kind in (MOE, MOA):
            values = [value for name, value in found.items() if name[0] == kind]
            if values:
                means = np.mean(values, axis=0)
                parts.append(f"{kind} {means[0]:.3f} (first expert {means[1]:.3f})")
        logger.info("iteration %d | router saturation: %s", record["iteration"], ", ".join(parts))
        if self._file is not None:
            append_record(self._file, self._record(found, record["iteration"]))

    def _keep_until(self, iteration: int) -> None:
        if self._file is not None and self._state.ctx.rank == 0:
            keep_records_until(self._file, iteration)

    def _record(
        self, found: Mapping[RouterId, tuple[float, float]], iteration: int
    ) -> dict[str, Any]:
        lists = as_record(found, num_layers=self._num_layers)
        return {"iteration": iteration, "reference": self._source, **lists}

    def _choices_of(self, found: FoundCheckpoint, lacking: tuple[str, ...]) -> Choices:
        """Route the probe with a checkpoint's weights; the run's are as before afterwards.

        Args:
            found: the checkpoint.
            lacking: weights with one of these in their names are not in it, and are 0 for it.
        """
        tensors = [
            tensor
            for module in self._state.modules
            for tensor in (*module.parameters(), *module.buffers())
        ]
        before = [tensor.detach().clone() for tensor in tensors]
        try:
            load_weights(self._state.modules, found, lacking=lacking)
            _set_to_zero(self._state.modules, lacking)
            return self._choose()
        finally:
            with torch.no_grad():
                for tensor, kept in zip(tensors, before, strict=True):
                    tensor.copy_(kept)

    def _choose(self) -> Choices:
        """Route the probe; a collective call."""
        chosen: dict[RouterId, list[np.ndarray]] = {}

        def keeper(name: RouterId) -> Any:
            def keep(_module: torch.nn.Module, inputs: tuple[Any, ...], routing: Routing) -> None:
                experts = by_gate(routing).experts
                padding = inputs[1] if len(inputs) > 1 else None
                if padding is not None:
                    experts = experts[~padding.flatten()]
                chosen.setdefault(name, []).append(experts.cpu().numpy().astype(np.int16))

            return keep

        handles = [
            router.register_forward_hook(keeper(name))
            for module in self._state.modules
            for name, router in find_routers(module).items()
        ]
        try:
            observe(self._state, self._objective, self._probe)
        finally:
            for handle in handles:
                handle.remove()
        return {name: np.concatenate(parts) for name, parts in chosen.items()}

    def _compare(self, choices: Choices) -> dict[RouterId, tuple[float, float]]:
        """Return the saturation for k experts and for the first one, of every router."""
        sums = torch.zeros(len(self._sizes), 3, dtype=torch.int64, device=self._state.ctx.device)
        counts = {name: Saturation(*size) for name, size in self._sizes.items()}
        for row, (name, count) in enumerate(counts.items()):
            if name in choices:
                count.add(self._reference[name], choices[name])
            sums[row] += torch.tensor([count.tokens, count.common, count.same_first]).to(sums)
        # Over the world. Copies of a layer add to numerators and denominators alike.
        dist.all_reduce(sums)
        found = {}
        for name, (tokens, common, first) in zip(counts, sums.tolist(), strict=True):
            found[name] = (common / (tokens * self._sizes[name][1]), first / tokens)
        return found


def _check(found: FoundCheckpoint, model: MoEModelConfig, state: TrainState) -> tuple[str, ...]:
    """Return parts of the names of the run's weights that a checkpoint lacks.

    Raises:
        CheckpointError: it is of another architecture, or has other adapters.
    """
    added = check_architecture(found, model)
    assert state.check_saved is not None  # every stage of training has one
    return (*state.check_saved(saved_config(found), False), *added.values())


def _set_to_zero(modules: Sequence[torch.nn.Module], parts: tuple[str, ...]) -> None:
    """Set weights with one of the parts in their names to 0: no biases, no adapters."""
    with torch.no_grad():
        for module in modules:
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if any(part in name for part in parts):
                    tensor.zero_()


def _router_sizes(model: MoEModelConfig) -> dict[RouterId, tuple[int, int]]:
    """Return experts and k of every router of the model.

    Raises:
        ConfigError: there are none.
    """
    if model.moe_share_across_layers:
        raise ConfigError(
            "--log-router-saturation compares the router of each layer, but layers share one"
            " (moe_share_across_layers True); drop it"
        )
    if model.is_expert_choice:
        raise ConfigError(
            "--log-router-saturation compares the k experts of each token, but with router"
            f" '{model.router}' experts choose tokens; drop it, or use another router"
        )
    sizes: dict[RouterId, tuple[int, int]] = {}
    for layer in range(model.num_layers):
        if model.num_experts is not None and model.has_experts(layer + 1):
            sizes[MOE, layer] = (model.num_experts, model.moe_router_topk)
        if model.attention_experts is not None:
            sizes[MOA, layer] = (model.attention_experts, model.attention_topk)
    if not sizes:
        raise ConfigError(
            "--log-router-saturation compares routers, but the model has no experts; drop it, or"
            " give --num-experts"
        )
    return sizes


def _first_batch(state: TrainState) -> Any:
    """Return this rank's micro-batches of the first validation set's first global batch.

    Raises:
        ConfigError: there is no validation set.
    """
    if not state.validation:
        raise ConfigError(
            "--log-router-saturation compares routers at each evaluation, but there is no"
            " validation set; give --split 99,1 or --valid-data-path, and --eval-interval"
        )
    training = state.cfg.training
    return next(
        iter(
            next(iter(state.validation.values())).batches(
                1,
                global_batch_size=training.global_batch_size,
                micro_batch_size=training.micro_batch_size,
                data_parallel_rank=state.ctx.data_parallel_rank,
                data_parallel_size=state.ctx.layout.data,
            )
        )
    )


def _record_file(state: TrainState) -> Path | None:
    save = state.cfg.checkpoint.save
    return None if save is None else Path(save) / SATURATION_NAME


def _find(path: str) -> FoundCheckpoint:
    """Find the checkpoint that a run directory, or an iter_... directory in one, names."""
    place = Path(path)
    named = re.fullmatch(r"iter_(\d+)", place.name)
    if named is None:
        return find_checkpoint(place)
    return find_checkpoint(place.parent, iteration=int(named[1]))


def as_record(
    found: Mapping[RouterId, tuple[float, float]], *, num_layers: int
) -> dict[str, list[float | None]]:
    """Return lists by layer, as expert_load.jsonl has them; attention experts' begin with moa_.

    Args:
        found: both shares by router.
        num_layers: of the model; None stands for a layer without such a router.
    """
    record: dict[str, list[float | None]] = {}
    for kind, prefix in ((MOE, ""), (MOA, "moa_")):
        if not any(name[0] == kind for name in found):
            continue
        for place, key in enumerate(("saturation", "saturation_first")):
            record[f"{prefix}{key}"] = [
                round(found[kind, layer][place], 6) if (kind, layer) in found else None
                for layer in range(num_layers)
            ]
    return record
