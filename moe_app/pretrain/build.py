"""Builds a training state from a config: data, model, optimizer."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron.trainer.config.schedule_lengths import describe_lengths
from megatron.trainer.config.schema import DataConfig, TrainingConfig
from megatron.trainer.config.validate import MOE_ACT
from megatron.trainer.data.batch_views import DocumentRule
from megatron.trainer.data.build import DataBundle, build_data, token_prefixes
from megatron.trainer.data.describe import describe
from megatron.trainer.data.document_borders import check_ends
from megatron.trainer.data.encoding import Ids
from megatron.trainer.data.source import WindowSource
from megatron.trainer.data.token_bytes import count_token_bytes
from megatron.trainer.data.token_manifest import check_manifests
from megatron.trainer.data.tokenizer import load_tokenizer
from megatron.trainer.data.verify_once import verify_once
from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.optim.adamw import describe_groups
from megatron.trainer.optim.schedules import anneal_schedule, build_schedule
from megatron.trainer.optim.wrap import prepare_training, wrap_model
from megatron.trainer.runtime.collective import on_all_ranks, on_rank0, require_same
from megatron.trainer.runtime.launch import RunContext
from megatron.trainer.state import TrainState
from moe_app.pretrain.config import PretrainConfig
from moe_app.pretrain.describe import data_lines, describe_documents, describe_run
from moe_app.pretrain.hooks import RouterHealth
from moe_app.pretrain.same_kernels import agree_on_kernels
from moe_app.tasks.passes import open_tasks
from moe_ext.builder import BuiltModel, build_model
from moe_ext.compat import check_versions
from moe_ext.counting import training_flops_per_token
from moe_ext.layers.transformer import transformer_config
from moe_ext.routers.updates import RouterUpdates

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OpenedData:
    """Holds the data of a run."""

    bundle: DataBundle
    """What it trains on and evaluates on."""
    documents: DocumentRule | None
    """How documents, or texts, of one sequence are kept apart; None lets attention cross them."""
    notes: Sequence[str] = ()
    """Lines for the log."""


def open_token_files(cfg: PretrainConfig, ctx: RunContext) -> OpenedData:
    """Open and check the token files of a run; a collective call."""
    documents = on_rank0(
        "looking for the end of documents", lambda: document_rule(cfg.data, cfg.model.vocab_size)
    )
    data = open_data(cfg, ctx, documents)
    notes = on_rank0("checking the data", lambda: check_data(cfg, data, documents))
    return OpenedData(bundle=data, documents=documents, notes=notes)


def build_state(
    cfg: PretrainConfig, ctx: RunContext, opened: OpenedData | None = None
) -> TrainState:
    """Build everything that a run needs, at iteration 0; a collective call.

    Args:
        cfg: of the run.
        ctx: its ranks.
        opened: the data; None opens token files.
    """
    schedule = build_schedule(cfg)
    opened = open_token_files(cfg, ctx) if opened is None else opened
    data = opened.bundle
    tasks = open_tasks(cfg, ctx, data.validation)
    built = build_chunks(cfg, ctx, seed=cfg.training.seed)
    cfg.trainable.apply(built.chunks, cfg.model)
    chunks = wrap_model(cfg, list(built.chunks), built.config)
    state = TrainState(
        cfg=cfg,
        ctx=ctx,
        chunks=chunks,
        transformer_config=built.config,
        optimizer=prepare_training(cfg, chunks, built.config, rates=cfg.trainable.rates(cfg.model)),
        check_saved=cfg.check_saved,
        schedule=schedule,
        anneal=(partial(anneal_schedule, cfg) if cfg.checkpoint.anneal_from is not None else None),
        train_data=data.train,
        validation=data.validation,
        tasks=tasks,
        token_bytes=_token_bytes(cfg, ctx) if data.validation else None,
        documents=opened.documents,
        metrics=RouterHealth(built.metrics) if built.metrics else None,
        updates=RouterUpdates(built.chunks) if built.metrics else None,
        flops_per_token=training_flops_per_token(cfg.model, cfg.training.seq_length),
    )
    agree_on_kernels(
        backend=None if built.backend is None else built.backend.name,
        fused_kernels=cfg.model.fused_kernels,
        device_type=ctx.device.type,
    )
    table, warnings = data_lines(cfg, data)
    head = (
        *describe_run(cfg, ctx, built.backend),
        *cfg.trainable.describe(),
        *describe_lengths(cfg),
        *describe_documents(cfg, ctx, opened.documents),
    )
    told = () if tasks is None else tasks.describe()
    for line in (*head, *table, *(f"data: {note}" for note in opened.notes), *told):
        logger.info(line)
    for line in warnings:
        logger.warning(line)
    for line in describe_groups(state.optimizer, cfg.optimizer.weight_decay):
        logger.info("parameters: %s", line)
    return state


def _token_bytes(cfg: PretrainConfig, ctx: RunContext) -> torch.Tensor | None:
    """Return the bytes of each token's text, None without a tokenizer; a collective call."""
    data = cfg.data

    def count() -> Ids | None:
        if data.tokenizer_model is None:
            return None
        try:
            tokenizer = load_tokenizer(
                data.tokenizer_type, data.tokenizer_model, eod_token=data.eod_token
            )
        except DataError as error:
            logger.warning("validation has no bits per byte: %s", error)
            return None
        return count_token_bytes(tokenizer, cfg.model.vocab_size)

    found = on_rank0("counting the bytes of tokens", count)
    return None if found is None else torch.from_numpy(found).to(ctx.device)


def build_chunks(cfg: PretrainConfig, ctx: RunContext, *, seed: int | None) -> BuiltModel:
    """Build this rank's model chunks on its device; a seed draws initial weights."""
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
            **_recompute_settings(training),
        )
        return build_model(
            cfg.model,
            config,
            pg_collection=ctx.groups,
            seq_length=training.seq_length,
            seed=seed,
            recompute_activation=_recomputes_activation(training),
            lora=cfg.trainable.lora,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except (AssertionError, ImportError) as error:
        raise ConfigError(f"megatron-core refuses this configuration: {error}") from error


def _recomputes_activation(training: TrainingConfig) -> bool:
    """Return whether the expert backend must recompute its activation in backward."""
    return training.recompute_granularity == "selective" and MOE_ACT in training.recompute_modules


def _recompute_settings(training: TrainingConfig) -> dict[str, Any]:
    """Translate the recomputation settings to megatron-core's, all but `moe_act`."""
    if training.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": training.recompute_method,
            "recompute_num_layers": training.recompute_num_layers,
        }
    if training.recompute_granularity is None:
        return {}
    modules = [name for name in training.recompute_modules if name != MOE_ACT]
    return {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}


def open_data(cfg: PretrainConfig, ctx: RunContext, documents: DocumentRule | None) -> DataBundle:
    """Open the data on every rank; a collective call.

    Raises:
        UserError: they are missing or damaged on some rank, or not the same on all of them.
    """
    prefixes = on_all_ranks("opening the data", lambda: token_prefixes(cfg.data))
    verified = verify_once(prefixes, vocab_size=cfg.model.vocab_size)

    def build() -> DataBundle:
        data = build_data(
            cfg.data,
            vocab_size=cfg.model.vocab_size,
            seq_length=cfg.training.seq_length,
            seed=cfg.training.seed,
            samples_per_step=cfg.training.global_batch_size,
            gpu=ctx.device if ctx.device.type == "cuda" else None,
            documents=documents,
            verified=verified,
        )
        _check_validation(cfg, data)
        return data

    data = on_all_ranks("opening the data", build)
    require_same(
        "data",
        {
            **{f"{row['use']} {row['source']}": row for row in describe(data)},
            **{f"content of {use}": each.fingerprint for use, each in data.sources().items()},
        },
        error_class=DataError,
        remedy="let all nodes read the same token files",
    )
    return data


def document_rule(data: DataConfig, vocab_size: int) -> DocumentRule | None:
    """Return what `--reset-position-ids` and `--reset-attention-mask` ask for; None for neither.

    The index of a token file says where documents end. Random tokens have an id alone to say it.
    """
    eod = data.eod_token_id
    if not (data.reset_position_ids or data.reset_attention_mask):
        if eod is not None:
            raise ConfigError(
                f"--eod-token-id {eod} changes nothing without --reset-position-ids or"
                " --reset-attention-mask; give one of them, or drop it"
            )
        return None
    if eod is None and data.tokenizer_model is not None:
        eod = load_tokenizer(
            data.tokenizer_type, data.tokenizer_model, eod_token=data.eod_token
        ).eod
    if eod is None and data.mock_data:
        raise ConfigError(
            "--reset-position-ids and --reset-attention-mask need to know which token ends a"
            " document, but random tokens have no index that says it, and there is neither a"
            " tokenizer nor an id; give --tokenizer-model or --eod-token-id"
        )
    if eod is not None and not 0 <= eod < vocab_size:
        raise ConfigError(
            f"the id that ends a document ({eod}) is no token of a vocabulary of {vocab_size}, so"
            f" no document would end; give an --eod-token-id of 0 to {vocab_size - 1}"
        )
    return DocumentRule(
        eod=eod,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        is_varlen=data.reset_attention_mask and data.packed_attention != "mask",
    )


def check_data(cfg: PretrainConfig, data: DataBundle, documents: DocumentRule | None) -> list[str]:
    """Check on rank 0 that the files are what the run takes them for; return lines for the log."""
    sources = {use: each for use, each in data.sources().items() if isinstance(each, WindowSource)}
    files = {each.prefix: each.facts for each in sources.values() if each.prefix and each.facts}
    notes = check_manifests(
        files,
        tokenizer_type=cfg.data.tokenizer_type,
        tokenizer_model=cfg.data.tokenizer_model,
        vocab_size=cfg.model.vocab_size,
        eod=None if documents is None else documents.eod,
    )
    for use, source in sources.items():
        if documents is not None:
            notes += check_ends(
                source,
                eod=documents.eod,
                is_given=cfg.data.eod_token_id is not None,
                is_training=use.startswith("train "),
            )
    return notes


def _check_validation(cfg: PretrainConfig, data: DataBundle) -> None:
    """Refuse, before the first step, a validation set of less than one global batch."""
    if cfg.evaluation.eval_interval and not data.validation and not cfg.evaluation.eval_tasks:
        logger.warning(
            "--eval-interval %d, but there is no validation set: give --split 99,1 or"
            " --valid-data-path, or --eval-tasks",
            cfg.evaluation.eval_interval,
        )
    for validation in data.validation.values():
        validation.num_global_batches(
            cfg.evaluation.eval_iters, global_batch_size=cfg.training.global_batch_size
        )
