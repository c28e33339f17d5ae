"""What generate.py and score.py share: their flags, the checkpoint, the model under any layout."""

import argparse
import contextlib
import dataclasses
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.trainer.checkpoint import FoundCheckpoint, find_checkpoint
from megatron.trainer.config.cli import load_config
from megatron.trainer.config.schema import DataConfig, ParallelConfig, TrainingConfig
from megatron.trainer.data.tokenizer import TOKENIZERS, Tokenizer, load_tokenizer
from megatron.trainer.errors import ConfigError
from megatron.trainer.inference.staged import StagedModel
from megatron.trainer.records.run_dir import CONFIG_NAME
from megatron.trainer.resume import load_weights
from megatron.trainer.runtime.launch import (
    RunContext,
    agree,
    connect,
    environment_rank,
    environment_world_size,
    initialize,
    shut_down,
)
from moe_app.convert.checks import check_size
from moe_app.pretrain.build import build_chunks
from moe_app.pretrain.config import PretrainConfig
from moe_ext.attention.cache import KeyValueCache

logger = logging.getLogger("inference")

_LAYOUT_HELP = {
    "tensor_model_parallel_size": "ranks that share each matrix",
    "pipeline_model_parallel_size": "stages the layers are cut into",
    "expert_model_parallel_size": "ranks a layer's experts are spread over",
    "expert_tensor_parallel_size": "ranks that share an expert (the tensor parallel size)",
    "threads_per_rank": "CPU threads of a rank (OMP_NUM_THREADS, or cores / ranks)",
    "distributed_timeout_minutes": "how long to wait for a lost rank",
}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint whose model is not built yet."""

    found: FoundCheckpoint
    """Where it is."""
    saved: PretrainConfig
    """The config of the run that wrote it."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint's model, ready to compute."""

    module: torch.nn.Module
    """This rank's part."""
    staged: StagedModel
    """A pass over all parts."""
    ctx: RunContext
    """This rank's place."""


class CachedModel:
    """A model that remembers what it took in: the `Decoder` of one batch.

    Args:
        loaded: the model, which must be using `cache`.
        cache: what remembers.
    """

    def __init__(self, loaded: LoadedModel, cache: KeyValueCache) -> None:
        self._staged = loaded.staged
        self._device = loaded.ctx.device
        self._cache = cache
        self.share = loaded.staged.share
        self.most = loaded.staged.most

    def next_logits(
        self, tokens: torch.Tensor, position_ids: torch.Tensor, last: torch.Tensor
    ) -> torch.Tensor | None:
        """See `StagedModel.next_logits`."""
        self._cache.place(position_ids.to(self._device))
        return self._staged.next_logits(tokens, position_ids, last)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, with which tokenizer, in which precision and layout."""
    model = parser.add_argument_group("model")
    model.add_argument("--load", required=True, metavar="DIR", help="a run's --save directory")
    model.add_argument(
        "--ckpt-step", type=int, metavar="N", help="iteration to load; without it the newest"
    )
    model.add_argument(
        "--tokenizer-model", metavar="FILE", help="use this one, not the checkpoint's"
    )
    model.add_argument(
        "--tokenizer-type", choices=list(TOKENIZERS), help="what wrote --tokenizer-model"
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


def positive(text: str) -> int:
    """A flag's whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; on ranks other than 0 without a word."""
    with contextlib.ExitStack() as stack:
        if environment_rank() != 0:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        return parser.parse_args(argv)


@contextlib.contextmanager
def ranks(args: argparse.Namespace) -> Iterator[None]:
    """Join the other ranks, for a while."""
    connect(_parallel(args))
    try:
        yield
    finally:
        shut_down()


def open_checkpoint(args: argparse.Namespace, *, prog: str) -> Opened:
    """Find the checkpoint and read its config; a collective call.

    Raises:
        CheckpointError: there is no whole one, or its config is of a larger model.
    """
    found = find_checkpoint(Path(args.load), iteration=args.ckpt_step)
    config = ["--config", str(found.path / CONFIG_NAME)]
    saved = agree(lambda: load_config(PretrainConfig, config, prog=prog, description=""))
    shards = [shard.stat().st_size for shard in found.path.glob("*.distcp")]
    agree(lambda: check_size(saved.model, sum(shards), config=found.path / CONFIG_NAME))
    return Opened(found=found, saved=saved)


def open_tokenizer(args: argparse.Namespace, opened: Opened) -> Tokenizer:
    """The tokenizer to use with a checkpoint.

    Raises:
        ConfigError: there is none, or it has ids that the model does not know.
        DataError: its file is missing or of another kind.
    """
    tokenizer = find_tokenizer(opened.saved.data, opened.found, args)
    known = opened.saved.model.vocab_size
    if tokenizer.vocab_size > known:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model's vocab_size is"
            f" {known}; every id needs an embedding; name the tokenizer that made"
            " the training data with --tokenizer-model"
        )
    return tokenizer


def find_tokenizer(data: DataConfig, found: FoundCheckpoint, args: argparse.Namespace) -> Tokenizer:
    """The tokenizer that was named, or else the one in the checkpoint.

    Args:
        data: of the run that wrote the checkpoint.
        found: the checkpoint.
        args: the command line.

    Raises:
        ConfigError: there is neither.
        DataError: its file is missing or of another kind.
    """
    kind = args.tokenizer_type or data.tokenizer_type
    if args.tokenizer_model is not None:
        return load_tokenizer(kind, args.tokenizer_model)
    if data.tokenizer_model is None or data.mock_data:
        why = "its data were --mock-data" if data.mock_data else "its run had no --tokenizer-model"
        raise ConfigError(
            f"{found.path} brings no tokenizer, because {why}; text needs"
            " one; name the tokenizer that made the training data with --tokenizer-model"
        )
    return load_tokenizer(kind, str(found.path / Path(data.tokenizer_model).name))


def load_model(args: argparse.Namespace, opened: Opened) -> LoadedModel:
    """Build the model under the layout that `args` asks for; a collective call.

    Raises:
        ConfigError: the ranks, or the model, cannot be divided so.
        CheckpointError: the weights do not fit.
    """
    saved = opened.saved
    bf16 = saved.training.bf16 if args.bf16 is None else args.bf16
    cfg = PretrainConfig(
        # The other dispatchers want batches of the same shape on all data parallel ranks.
        model=dataclasses.replace(
            saved.model, moe_token_dispatcher_type="alltoall", expert_backend="auto"
        ),
        parallel=_parallel(args),
        training=TrainingConfig(
            seq_length=saved.training.seq_length,
            bf16=bf16,
            global_batch_size=environment_world_size(),  # whatever the layout, a multiple of DP
        ),
    )
    ctx = initialize(cfg, is_training=False)
    (module,) = build_chunks(cfg, ctx, seed=None).chunks
    if bf16:
        module.bfloat16()  # every parameter, as training has it
    load_weights([module], opened.found)
    module.eval()
    logger.info("took the weights of %s, to compute in %s", opened.found.path, _precision(bf16))
    staged = StagedModel(module, ctx, vocab_size=saved.model.vocab_size)
    return LoadedModel(module=module, staged=staged, ctx=ctx)


def _parallel(args: argparse.Namespace) -> ParallelConfig:
    """The layout; sequence parallelism is off, for one new token cannot be split."""
    sizes = {name: getattr(args, name) for name in _LAYOUT_HELP}
    return ParallelConfig(device=args.device, sequence_parallel=False, **sizes)


def _precision(bf16: bool) -> str:
    return "bf16" if bf16 else "fp32"
