"""Joins the two packages: a run config with a model in it, and a training state built from it.

Every tool that trains or loads a model goes through here, so that all of them mean the same thing
by the same recipe.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from planning import anneal_schedule, build_schedule, data_lines

from megatron.trainer.config import DataConfig, RunConfig
from megatron.trainer.data.build import DataBundle, build_data
from megatron.trainer.data.sharing import DocumentRule
from megatron.trainer.data.tokenizer import load_tokenizer
from megatron.trainer.errors import ConfigError
from megatron.trainer.hooks import (
    Console,
    Hook,
    MetricsFile,
    Record,
    TensorBoard,
    WeightsAndBiases,
    append_record,
    keep_records_until,
)
from megatron.trainer.launch import RunContext, agree, environment_rank
from megatron.trainer.lengths import describe_lengths, resolve_lengths
from megatron.trainer.load import dump_config, flatten, load_config
from megatron.trainer.optim import describe_groups
from megatron.trainer.plots import RunPlots, plot_expert_load
from megatron.trainer.run_files import CONFIG_NAME, LOAD_NAME, METRICS_NAME
from megatron.trainer.setup import prepare_training, wrap_model
from megatron.trainer.state import TrainState
from megatron.trainer.validate import MOE_ACT
from moe_ext.builder import BuiltModel, build_model
from moe_ext.compat import check_versions
from moe_ext.config import MoEModelConfig
from moe_ext.counting import count_parameters, training_flops_per_token
from moe_ext.experts import EXPERT_BACKENDS, Use, choose_backend, look_up_backend
from moe_ext.functional import layer_coefficients
from moe_ext.metrics import MOA, MOE, RouterMetrics, RouterReport
from moe_ext.presets import PRESETS
from moe_ext.transformer import transformer_config

logger = logging.getLogger("recipe")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """A pretraining run."""

    model: MoEModelConfig = field(default_factory=MoEModelConfig)
    """The architecture."""


def parse(argv: Sequence[str] | None, *, prog: str, description: str) -> PretrainConfig:
    """Read recipe and flags; on ranks other than 0 without a word."""
    return load_config(
        PretrainConfig,
        sys.argv[1:] if argv is None else argv,
        presets=PRESETS,
        resolve=resolve_lengths,
        prog=prog,
        description=description,
        quiet=environment_rank() != 0,
    )


def build_chunks(cfg: PretrainConfig, ctx: RunContext, *, seed: int | None) -> BuiltModel:
    """This rank's part of the model, on its device, with initial weights if there is a seed."""
    check_versions()
    layout, training = ctx.layout, cfg.training
    try:
        config = transformer_config(
            cfg.model,
            bf16=training.bf16,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=(
                layout.virtual_stages if layout.virtual_stages > 1 else None
            ),
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            sequence_parallel=layout.sequence_parallel,
            # Interleaving over 2 stages exchanges two pairs of messages with the same rank at once;
            # only the overlapped exchange keeps them apart (it uses a group for each direction).
            overlap_p2p_comm=layout.virtual_stages > 1,
            batch_p2p_comm=layout.virtual_stages == 1,
            **_recompute_settings(cfg, ctx),
        )
        return build_model(
            cfg.model,
            config,
            pg_collection=ctx.groups,
            seq_length=training.seq_length,
            seed=seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except (AssertionError, ImportError) as error:
        raise ConfigError(f"megatron-core refuses this configuration: {error}") from error


def _recompute_settings(cfg: PretrainConfig, ctx: RunContext) -> dict[str, Any]:
    """What megatron-core is told about recomputation.

    The activation of the experts (`moe_act`) is the backends' own affair.

    Raises:
        ValueError: the backend keeps the activation that is to be computed again.
    """
    training = cfg.training
    if training.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": training.recompute_method,
            "recompute_num_layers": training.recompute_num_layers,
        }
    if training.recompute_granularity is None:
        return {}
    modules = [name for name in training.recompute_modules if name != MOE_ACT]
    if len(modules) < len(training.recompute_modules) and cfg.model.num_experts is not None:
        name = choose_backend(cfg.model.expert_backend, _backend_use(cfg, ctx)).name
        if look_up_backend(name).keeps_activation:
            able = [key for key, each in EXPERT_BACKENDS.items() if not each.keeps_activation]
            raise ValueError(
                f"recompute_modules names {MOE_ACT}, but expert_backend '{name}' keeps its"
                f" activation; use expert_backend {' or '.join(able)}, or drop {MOE_ACT}"
            )
    return {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}


def build_state(cfg: PretrainConfig, ctx: RunContext) -> TrainState:
    """Everything a run needs, at iteration 0."""
    schedule = build_schedule(cfg)
    data = agree(
        lambda: build_data(
            cfg.data,
            vocab_size=cfg.model.vocab_size,
            seq_length=cfg.training.seq_length,
            seed=cfg.training.seed,
            samples_per_step=cfg.training.global_batch_size,
        )
    )
    documents = agree(lambda: document_rule(cfg.data, cfg.model.vocab_size))
    agree(lambda: _check_validation(cfg, data))
    built = build_chunks(cfg, ctx, seed=cfg.training.seed)
    chunks = wrap_model(cfg, list(built.chunks), built.config)
    state = TrainState(
        cfg=cfg,
        ctx=ctx,
        chunks=chunks,
        transformer_config=built.config,
        optimizer=prepare_training(cfg, chunks, built.config),
        schedule=schedule,
        anneal=(partial(anneal_schedule, cfg) if cfg.checkpoint.anneal_from is not None else None),
        train_data=data.train,
        validation=data.validation,
        documents=documents,
        metrics=RouterHealth(built.metrics) if built.metrics else None,
        flops_per_token=training_flops_per_token(cfg.model, cfg.training.seq_length),
    )
    table, warnings = data_lines(cfg, data)
    for line in (*describe_run(cfg, ctx), *describe_lengths(cfg), *table):
        logger.info(line)
    for line in warnings:
        logger.warning(line)
    for line in describe_groups(state.optimizer, cfg.optimizer.weight_decay):
        logger.info("parameters: %s", line)
    return state


def document_rule(data: DataConfig, vocab_size: int) -> DocumentRule | None:
    """What `--reset-position-ids` and `--reset-attention-mask` ask for; None if neither is set."""
    eod = data.eod_token_id
    if not (data.reset_position_ids or data.reset_attention_mask):
        if eod is not None:
            raise ConfigError(
                f"--eod-token-id {eod} changes nothing without --reset-position-ids or"
                " --reset-attention-mask; give one of them, or drop it"
            )
        return None
    if eod is None:
        if data.tokenizer_model is None:
            raise ConfigError(
                "--reset-position-ids and --reset-attention-mask need to know which token ends a"
                " document, but there is neither a tokenizer nor an id; give --tokenizer-model or"
                " --eod-token-id"
            )
        eod = load_tokenizer(data.tokenizer_type, data.tokenizer_model).eod
    if not 0 <= eod < vocab_size:
        raise ConfigError(
            f"the id that ends a document ({eod}) is no token of a vocabulary of {vocab_size}, so"
            f" no document would end; give an --eod-token-id of 0 to {vocab_size - 1}"
        )
    return DocumentRule(
        eod=eod,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
    )


def _check_validation(cfg: PretrainConfig, data: DataBundle) -> None:
    """Find out now, not at the first evaluation, that a set has less than one global batch."""
    if cfg.evaluation.eval_interval and not data.validation:
        logger.warning(
            "--eval-interval %d, but there is no validation set: give --split 99,1 or"
            " --valid-data-path",
            cfg.evaluation.eval_interval,
        )
    for validation in data.validation.values():
        validation.num_global_batches(
            cfg.evaluation.eval_iters, global_batch_size=cfg.training.global_batch_size
        )


_LOAD_NAMES = {MOE: "load", MOA: "moa_load"}
_EXPERT_NAMES = {MOE: "expert", MOA: "attention expert"}


class RouterHealth:
    """Router measurements as the training loop wants them; keeps the last reports for the plots.

    Args:
        metrics: by kind of router, the same kinds on every rank.
    """

    def __init__(self, metrics: Mapping[str, RouterMetrics]) -> None:
        self._metrics = metrics
        self.last: dict[str, RouterReport] = {}

    def reset(self) -> None:
        """Forget what was measured."""
        for metrics in self._metrics.values():
            metrics.reset()

    def reduce(self) -> Mapping[str, Any]:
        """Summaries and per-layer lists over all ranks; a collective call."""
        self.last = {kind: metrics.reduce() for kind, metrics in self._metrics.items()}
        record: dict[str, Any] = {}
        for kind, report in self.last.items():
            record |= report.as_dict(kind) | report.layers_as_dict(kind)
        return record


class ExpertLoad(Hook):
    """Writes every expert's load beside the metrics, and draws the last ones as heat maps."""

    def __init__(self, health: RouterHealth, run_directory: Path) -> None:
        self._health = health
        self._file = run_directory / LOAD_NAME
        self._plots = run_directory / "plots"
        self._iteration = 0

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Drop records of steps that a resumed run will take again."""
        keep_records_until(self._file, iteration)

    def on_rewind(self, iteration: int) -> None:
        """Drop records of steps that are taken again."""
        keep_records_until(self._file, iteration)

    def on_log(self, record: Record) -> None:
        """Append [layers][experts] loads of each kind of router, 1 = even share."""
        if self._health.last:
            self._iteration = record["iteration"]
            loads = {
                _LOAD_NAMES[kind]: [[round(x, 4) for x in row] for row in report.load.tolist()]
                for kind, report in self._health.last.items()
            }
            append_record(self._file, {"iteration": self._iteration, **loads})

    def on_end(self) -> None:
        """Draw."""
        for kind, report in self._health.last.items():
            plot_expert_load(
                report.load.tolist(),
                self._plots / f"expert_{_LOAD_NAMES[kind]}.png",
                title=f"{_EXPERT_NAMES[kind]} load, global batch of iteration {self._iteration}",
            )


def build_hooks(cfg: PretrainConfig, state: TrainState) -> list[Hook]:
    """The watchers of this rank: all of them on rank 0, none elsewhere."""
    if state.ctx.rank != 0:
        return []
    hooks: list[Hook] = [Console(progress=cfg.logging.progress)]
    if cfg.checkpoint.save is None:
        return hooks
    directory = Path(cfg.checkpoint.save)
    (directory / CONFIG_NAME).write_text(dump_config(cfg), encoding="utf-8")
    hooks.append(MetricsFile(directory / METRICS_NAME))
    if cfg.logging.tensorboard:
        hooks.append(TensorBoard(directory / "tensorboard"))
    if cfg.logging.wandb_project is not None:
        hooks.append(WeightsAndBiases(cfg.logging, directory, flatten(cfg)))
    if isinstance(state.metrics, RouterHealth):
        hooks.append(ExpertLoad(state.metrics, directory))
    hooks.append(RunPlots(directory / METRICS_NAME, directory / "plots"))
    return hooks


def _backend_use(cfg: PretrainConfig, ctx: RunContext) -> Use:
    """What this run needs an expert backend for."""
    return Use(
        device_type=ctx.device.type,
        dtype=torch.bfloat16 if cfg.training.bf16 else torch.float32,
        widths=cfg.model.expert_widths(
            tensor=ctx.layout.tensor, expert_tensor=ctx.layout.expert_tensor
        ),
    )


def describe_run(cfg: PretrainConfig, ctx: RunContext) -> list[str]:
    """The head of the log: what is trained, how it is laid out, what the losses mean."""
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
    if model.num_experts is not None or model.attention_experts is not None:
        choice = choose_backend(model.expert_backend, _backend_use(cfg, ctx))
        lines.append(f"expert backend: {choice.name}, {choice.reason}")
    if model.num_experts is not None:
        lines += [
            f"experts: {model.num_experts} per layer, {model.moe_router_topk} per token, router"
            f" {model.router}, dispatcher"
            f" {model.moe_token_dispatcher_type}",
            *_describe_losses(model, topk=model.moe_router_topk),
        ]
    if model.attention_experts is not None:
        lines += [
            f"attention experts: {model.attention_experts} per layer, {model.attention_topk} per"
            f" token, router {model.router}; logged as moa_...",
            *_describe_losses(model, topk=model.attention_topk, routers="attention "),
        ]
    return lines


def _describe_losses(model: MoEModelConfig, *, topk: int, routers: str = "") -> list[str]:
    """What the coefficients mean for the routers that choose `topk` experts."""
    balance, z = layer_coefficients(
        model.moe_loss_convention,
        model.moe_aux_loss_coeff,
        model.moe_z_loss_coeff,
        num_layers=model.num_layers,
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
