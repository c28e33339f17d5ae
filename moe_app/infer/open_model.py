"""Open a checkpoint and load its model under any layout, for generate and score."""

import argparse
import contextlib
import dataclasses
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron.trainer.checkpoint import FoundCheckpoint, find_checkpoint
from megatron.trainer.config.schema import DataConfig, ParallelConfig, TrainingConfig
from megatron.trainer.data.tokenizer import (
    TOKENIZER_CHOICES,
    Tokenizer,
    check_embedding,
    load_tokenizer,
)
from megatron.trainer.data.tokenizer_files import TOKENIZER_FILES
from megatron.trainer.errors import ConfigError
from megatron.trainer.inference.parallel_model import ParallelModel
from megatron.trainer.records.run_dir import CONFIG_NAME
from megatron.trainer.resume import load_weights
from megatron.trainer.runtime.collective import on_rank0
from megatron.trainer.runtime.launch import (
    RunContext,
    connect,
    environment_rank,
    environment_world_size,
    initialize,
    shut_down,
)
from moe_app.command_line import argument_text
from moe_app.convert.checks import check_size
from moe_app.pretrain.build import build_chunks
from moe_app.pretrain.config import PretrainConfig, read_saved_config
from moe_ext.attention.cache import KeyValueCache
from moe_ext.config import MoEModelConfig
from moe_ext.routers import get_router

logger = logging.getLogger("inference")

_LAYOUT_HELP = {
    "tensor_model_parallel_size": "ranks that share each matrix",
    "pipeline_model_parallel_size": "stages the layers are cut into",
    "expert_model_parallel_size": "ranks that share a layer's experts",
    "expert_tensor_parallel_size": "ranks that share an expert (the tensor parallel size)",
    "threads_per_rank": "CPU threads of a rank (OMP_NUM_THREADS, or cores / ranks)",
    "distributed_timeout_minutes": "how long to wait for a lost rank",
}


@dataclass(frozen=True, kw_only=True)
class OpenedCheckpoint:
    """Holds a checkpoint whose model is not built yet."""

    found: FoundCheckpoint
    """Its location."""
    saved: PretrainConfig
    """The config of the run that wrote it."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Holds a checkpoint's model, ready to compute."""

    module: torch.nn.Module
    """This rank's part."""
    parallel: ParallelModel
    """Forward passes over all ranks."""
    ctx: RunContext
    """This rank's context."""


class CachedModel:
    """Computes logits with a key-value cache: the `Decoder` of one batch.

    Args:
        loaded: the model, with `cache` installed.
        cache: keys and values of earlier tokens.
    """

    def __init__(self, loaded: LoadedModel, cache: KeyValueCache) -> None:
        self._parallel_model = loaded.parallel
        self._device = loaded.ctx.device
        self._cache = cache
        self.broadcast = loaded.parallel.broadcast
        self.all_reduce_max = loaded.parallel.all_reduce_max

    def next_logits(
        self, tokens: torch.Tensor, position_ids: torch.Tensor, last: torch.Tensor
    ) -> torch.Tensor | None:
        """Compute the next logits, see `ParallelModel.next_logits`."""
        self._cache.place(position_ids.to(self._device))
        return self._parallel_model.next_logits(tokens, position_ids, last)


def add_model_flags(parser: argparse.ArgumentParser, *, with_hf: bool = False) -> None:
    """Add the flags for model, tokenizer, precision and layout; --hf beside --load if asked for."""
    model = parser.add_argument_group("model")
    source = model.add_mutually_exclusive_group(required=True)
    source.add_argument("--load", metavar="DIR", help="a run's --save directory")
    if with_hf:
        source.add_argument("--hf", metavar="DIR", help="a Hugging Face checkpoint directory")
    model.add_argument(
        "--ckpt-step", type=int, metavar="N", help="iteration to load; without it the newest"
    )
    model.add_argument(
        "--tokenizer-model", metavar="PATH", help="use this file or directory, not the checkpoint's"
    )
    model.add_argument(
        "--tokenizer-type", choices=TOKENIZER_CHOICES, help="what wrote --tokenizer-model"
    )
    model.add_argument(
        "--eod-token",
        type=argument_text,
        metavar="TEXT",
        help="the token that ends a document, if nothing names it",
    )
    precision = model.add_mutually_exclusive_group()
    for flag, value, text in (("--bf16", True, "bfloat16"), ("--fp32", False, "fp32")):
        precision.add_argument(
            flag,
            dest="bf16",
            action="store_const",
            const=value,
            help=f"compute in {text}; without either flag, in the precision of training",
        )
    layout = parser.add_argument_group("layout", "Under torchrun; any, whatever layout trained it.")
    defaults = ParallelConfig()
    for name, text in _LAYOUT_HELP.items():
        default = getattr(defaults, name)
        shown = "" if default is None else f" ({default})"
        layout.add_argument(
            f"--{name.replace('_', '-')}",
            type=positive,
            default=default,
            metavar="N",
            help=text + shown,
        )
    layout.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default=defaults.device,
        help="where to compute (%(default)s)",
    )


def add_tokens_per_batch(group: "argparse._ArgumentGroup", *, default: int = 8192) -> None:
    """Add the flag for the size of a forward pass over whole texts."""
    group.add_argument(
        "--tokens-per-batch",
        type=positive,
        default=default,
        metavar="N",
        help="tokens of a forward pass of one data parallel rank, with padding (%(default)s)",
    )


def add_batch_size(group: "argparse._ArgumentGroup") -> None:
    """Add the flag for how many prompts are continued at once."""
    group.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        metavar="N",
        help="prompts to continue side by side, for each data parallel rank (%(default)s)",
    )


def positive(text: str) -> int:
    """Parse an integer of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; print only on rank 0."""
    with contextlib.ExitStack() as stack:
        if environment_rank() != 0:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        return parser.parse_args(argv)


@contextlib.contextmanager
def joined_ranks(args: argparse.Namespace) -> Iterator[None]:
    """Connect the ranks within the context."""
    connect(parallel_config(args))
    try:
        yield
    finally:
        shut_down()


def open_checkpoint(args: argparse.Namespace, *, prog: str) -> OpenedCheckpoint:
    """Find the checkpoint and read its config; a collective call.

    Raises:
        CheckpointError: there is no valid one, or its config describes a larger model.
    """
    found = find_checkpoint(Path(args.load), iteration=args.ckpt_step)
    saved = on_rank0(f"reading {found.path / CONFIG_NAME}", lambda: _read_config(found, prog=prog))
    return OpenedCheckpoint(found=found, saved=saved)


def _read_config(found: FoundCheckpoint, *, prog: str) -> PretrainConfig:
    """Read the config of the run that wrote a checkpoint, and check it against the files' size."""
    path = found.path / CONFIG_NAME
    saved = read_saved_config(path, prog=prog)
    shards = [shard.stat().st_size for shard in found.path.glob("*.distcp")]
    check_size(saved.model, sum(shards), config=path)
    return saved


def open_tokenizer(args: argparse.Namespace, opened: OpenedCheckpoint) -> Tokenizer:
    """Return the tokenizer to use with a checkpoint.

    Raises:
        ConfigError: there is none, or it has ids that the model does not know.
        DataError: its file is missing or of another kind.
    """
    tokenizer = find_tokenizer(opened.saved.data, opened.found, args)
    check_embedding(tokenizer, opened.saved.model.vocab_size)
    return tokenizer


def find_tokenizer(data: DataConfig, found: FoundCheckpoint, args: argparse.Namespace) -> Tokenizer:
    """Return the requested tokenizer, or else the one in the checkpoint.

    Args:
        data: of the run that wrote the checkpoint.
        found: the checkpoint.
        args: the command line.

    Raises:
        ConfigError: there is neither.
        DataError: its file is missing or of another kind.
    """
    kind, path = place_tokenizer(data, found, args)
    is_given = args.tokenizer_model is not None
    eod_token = args.eod_token if is_given else args.eod_token or data.eod_token
    return load_tokenizer(kind, path, eod_token=eod_token)


def place_tokenizer(
    data: DataConfig, found: FoundCheckpoint, args: argparse.Namespace
) -> tuple[str, str]:
    """Return type and path of the requested tokenizer, or else of the one in the checkpoint.

    Args:
        data: of the run that wrote the checkpoint.
        found: the checkpoint.
        args: the command line.

    Raises:
        ConfigError: there is neither.
    """
    kind: str = args.tokenizer_type or data.tokenizer_type
    if args.tokenizer_model is not None:
        return kind, args.tokenizer_model
    has_own = data.tokenizer_model is not None and not data.mock_data
    if not has_own and any((found.path / name).is_file() for name in TOKENIZER_FILES.values()):
        # Carried from an import that the run continued; the first type is an import's choice.
        return args.tokenizer_type or next(iter(TOKENIZER_FILES)), str(found.path)
    if not has_own:
        why = "its data were --mock-data" if data.mock_data else "its run had no --tokenizer-model"
        raise ConfigError(
            f"{found.path} has no tokenizer, because {why}; text needs"
            " one; name the tokenizer that made the training data with --tokenizer-model"
        )
    return kind, str(found.path / Path(data.tokenizer_model or "").name)


def load_model(
    args: argparse.Namespace,
    opened: OpenedCheckpoint,
    *,
    fill: Callable[[list[torch.nn.Module], FoundCheckpoint], None] = load_weights,
) -> LoadedModel:
    """Build the model under the layout that `args` asks for; a collective call.

    Args:
        args: the command line.
        opened: what to load.
        fill: reads the weights into this rank's chunks.

    Raises:
        ConfigError: the layout does not divide the ranks or the model, or the model's routers look
            ahead.
        CheckpointError: the weights do not fit.
    """
    saved = opened.saved
    _check_causal(saved.model)
    working = precision(args, saved)
    cfg = PretrainConfig(
        trainable=saved.trainable,
        # The other dispatchers need equal batch shapes on all data parallel ranks.
        model=dataclasses.replace(
            saved.model, moe_token_dispatcher_type="alltoall", expert_backend="auto"
        ),
        parallel=parallel_config(args),
        training=TrainingConfig(
            seq_length=saved.training.seq_length,
            bf16=working == "bf16",
            global_batch_size=environment_world_size(),  # a multiple of DP under any layout
        ),
    )
    ctx = initialize(cfg, is_training=False)
    (module,) = build_chunks(cfg, ctx, seed=None).chunks
    if working == "bf16":
        module.bfloat16()  # every parameter, as in training
    fill([module], opened.found)
    module.eval()
    logger.info("loaded the weights of %s, computing in %s", opened.found.path, working)
    parallel = ParallelModel(module, ctx, vocab_size=saved.model.vocab_size)
    return LoadedModel(module=module, parallel=parallel, ctx=ctx)


def _check_causal(model: MoEModelConfig) -> None:
    """Refuse a model in which a token's experts depend on tokens after it."""
    if model.num_experts is None and not model.is_moa:
        return
    if not get_router(model.router).is_causal:
        raise ConfigError(
            f"router '{model.router}' lets experts choose tokens, so that a token's experts depend"
            " on tokens after it and on padding: such a model cannot generate text or be scored"
            " here; its run evaluates it (--split, --valid-data-path, --eval-tasks), or load a"
            " model of another router"
        )


def parallel_config(args: argparse.Namespace) -> ParallelConfig:
    """Return the layout; sequence parallelism is off, because one new token cannot be split."""
    sizes = {name: getattr(args, name) for name in _LAYOUT_HELP}
    return ParallelConfig(device=args.device, sequence_parallel=False, **sizes)


def precision(args: argparse.Namespace, saved: PretrainConfig) -> Literal["bf16", "fp32"]:
    """Return what to compute in: as asked, or as the model was trained."""
    return "bf16" if (saved.training.bf16 if args.bf16 is None else args.bf16) else "fp32"
