"""Fine-tune a model on conversations; start it with torchrun, or alone on one device."""

import functools
import logging
from collections.abc import Sequence

from megatron.trainer.data.batch_views import DocumentRule
from megatron.trainer.data.build import DataBundle
from megatron.trainer.data.read_ahead import Loading
from megatron.trainer.data.sampler import Phase
from megatron.trainer.data.source import RowSource
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.data.tokenizer import check_embedding
from megatron.trainer.data.validation import ValidationSet
from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.objective import Objective, TokenObjective
from megatron.trainer.runtime.collective import on_all_ranks, require_same
from megatron.trainer.runtime.launch import RunContext, run_main
from megatron.trainer.runtime.upstream_warnings import hide_upstream_warnings
from megatron.trainer.state import TrainState
from moe_app.chat.chat_cache import TokenizerChoice
from moe_app.chat.dialogue import ChatKind
from moe_app.chat.text_source import open_chat_data
from moe_app.command_line import program
from moe_app.finetune.tuning_config import (
    FinetuneConfig,
    TuningConfig,
    length_known,
    parse_tuning,
)
from moe_app.pretrain.build import OpenedData, build_state
from moe_app.pretrain.command import run_stage

logger = logging.getLogger("finetune")


@hide_upstream_warnings()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe and flags in `argv`; returns the exit status."""
    return run_main(
        lambda: run_stage(
            parse_tuning(FinetuneConfig, argv, prog=program("finetune"), description=__doc__ or ""),
            Finetuning(),
        )
    )


class Finetuning:
    """Predicts the counted tokens of conversations."""

    def __init__(self) -> None:
        self._data: OpenedData | None = None

    def open(self, cfg: FinetuneConfig, ctx: RunContext) -> FinetuneConfig:
        """Tokenize the conversations, or read them from the cache; resolve the epochs."""
        self._data, num_samples = open_texts(cfg, ctx, "sft")
        return length_known(cfg, num_samples, ctx)

    def build(self, cfg: FinetuneConfig, ctx: RunContext) -> tuple[TrainState, Objective]:
        """Return the state at iteration 0, and the objective; a collective call."""
        state = build_state(cfg, ctx, self._data)
        reduction = cfg.sft.loss_reduction
        logger.info("objective: cross-entropy of the counted tokens, reduced by %s", reduction)
        return state, TokenObjective(reduction)


def open_texts(cfg: TuningConfig, ctx: RunContext, kind: ChatKind) -> tuple[OpenedData, int]:
    """Open the texts to train and evaluate on; a collective call.

    Args:
        cfg: of the run.
        ctx: its ranks.
        kind: of rows.

    Returns:
        The data, and the sequences of an epoch.

    Raises:
        UserError: they are missing or invalid on some rank, or not the same on all of them.
    """
    loading = Loading(
        num_ahead=cfg.data.num_workers, gpu=ctx.device if ctx.device.type == "cuda" else None
    )

    def build() -> DataBundle:
        cfg.chat.check(kind)
        opened = functools.partial(_open, cfg, kind, _tokenizer_of(cfg))
        train = opened(cfg.chat.train_data, "train", 0)
        phase = Phase(sources=(train.name,), weights=(1.0,))
        stream = SampleStream(
            [train],
            [phase],
            seq_length=cfg.training.seq_length,
            seed=cfg.training.seed,
            loading=loading,
        )
        validation = {}
        if cfg.chat.valid_data:
            valid = opened(cfg.chat.valid_data, "valid", 1)
            validation[valid.name] = ValidationSet(valid.name, valid, loading)
        return DataBundle(stream, validation)

    data = on_all_ranks("opening the texts", build)
    require_same(
        "data",
        {f"content of {use}": each.fingerprint for use, each in data.sources().items()},
        error_class=DataError,
        remedy="let all nodes read the same files",
    )
    for each in data.validation.values():
        each.num_global_batches(
            cfg.evaluation.eval_iters, global_batch_size=cfg.training.global_batch_size
        )
    rule = DocumentRule(
        eod=None,
        reset_position_ids=True,
        reset_attention_mask=True,
        is_varlen=cfg.data.packed_attention != "mask",
    )
    (train,) = data.train.sources
    return OpenedData(bundle=data, documents=rule), int(train.num_windows or 0)


def _tokenizer_of(cfg: TuningConfig) -> TokenizerChoice:
    """Return the tokenizer of a run, whose model has an embedding for each of its ids."""
    data = cfg.data
    if data.tokenizer_model is None:
        raise ConfigError(
            "tokenizer_model (None) must name a tokenizer, because the checkpoint carries none;"
            " give --tokenizer-model"
        )
    choice = TokenizerChoice(
        tokenizer_type=data.tokenizer_type,
        tokenizer_model=data.tokenizer_model,
        eod_token=data.eod_token,
    )
    check_embedding(choice.tokenizer, cfg.model.vocab_size)
    return choice


def _open(
    cfg: TuningConfig,
    kind: ChatKind,
    tokenizer: TokenizerChoice,
    files: Sequence[str],
    name: str,
    number: int,
) -> RowSource:
    """Open one set of texts."""
    return open_chat_data(
        cfg.chat,
        kind,
        files=files,
        name=name,
        tokenizer=tokenizer,
        seq_length=cfg.training.seq_length,
        seed=cfg.training.seed,
        number=number,
    )
