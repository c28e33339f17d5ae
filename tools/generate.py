"""Continue prompts with a trained model, in one process, whatever layout trained it.

    python tools/generate.py --load runs/quickstart --prompt "def main(" --prompt "import "

The model and its tokenizer come from the checkpoint. The text goes to standard output, everything
else to standard error.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import recipe
import torch

from megatron.trainer.checkpoint import FoundCheckpoint, find_checkpoint
from megatron.trainer.config import DataConfig, ParallelConfig, TrainingConfig
from megatron.trainer.data.tokenizer import TOKENIZERS, Tokenizer, load_tokenizer
from megatron.trainer.errors import ConfigError
from megatron.trainer.generate import (
    Choice,
    Forward,
    check_sampling,
    generate,
    greedy_token,
    next_token,
)
from megatron.trainer.launch import environment_world_size, initialize, run_main, shut_down
from megatron.trainer.load import load_config
from megatron.trainer.log import configure_logging
from megatron.trainer.resume import CONFIG_NAME, load_weights

logger = logging.getLogger("generate")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, and how the text goes on from it."""

    ids: list[int]
    """Its tokens."""
    choose: Choice
    """Picks each next token."""


def main(argv: Sequence[str] | None = None) -> int:
    """Generate as `argv` says; returns the exit status."""
    args = parse_args(argv)
    return run_main(lambda: run(args))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="generate.py", description="Continue prompts with a trained model, in one process."
    )
    parser.add_argument("--load", required=True, metavar="DIR", help="a run's --save directory")
    parser.add_argument(
        "--ckpt-step", type=int, metavar="N", help="iteration to load; without it the newest"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="text to continue; may be given several times",
    )
    add_sampling_flags(parser)
    parser.add_argument(
        "--tokenizer-model", metavar="FILE", help="use this one, not the checkpoint's"
    )
    parser.add_argument(
        "--tokenizer-type", choices=list(TOKENIZERS), help="what wrote --tokenizer-model"
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to compute (%(default)s)",
    )
    return parser.parse_args(argv)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How much text, and how each token is picked."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add (%(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="divides the logits (%(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw from the likeliest tokens that together have this probability (%(default)s)",
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="of the first prompt (%(default)s); the second has the next number",
    )


def run(args: argparse.Namespace) -> None:
    """Load the model and print each prompt with its continuation.

    Raises:
        UserError: a flag, the checkpoint or the tokenizer is wrong.
    """
    configure_logging(0)
    check_arguments(args)
    found = find_checkpoint(Path(args.load), iteration=args.ckpt_step)
    saved = load_config(
        recipe.PretrainConfig,
        ["--config", str(found.path / CONFIG_NAME)],
        prog="generate.py",
        description="",
    )
    tokenizer = find_tokenizer(saved.data, found, args)
    if tokenizer.vocab_size > saved.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model's vocab_size is"
            f" {saved.model.vocab_size}; every id needs an embedding; name the tokenizer that made"
            " the training data with --tokenizer-model"
        )
    prompts = encode_prompts(args, tokenizer, seq_length=saved.training.seq_length)
    cfg = recipe.PretrainConfig(
        model=saved.model,
        parallel=ParallelConfig(device=args.device),
        training=TrainingConfig(
            seq_length=saved.training.seq_length, bf16=saved.training.bf16, global_batch_size=1
        ),
    )
    ctx = initialize(cfg)
    try:
        forward = build_forward(cfg, recipe.build_chunks(cfg, ctx, seed=None).chunks, found)
        for number, prompt in enumerate(prompts, start=1):
            new = generate(
                forward,
                prompt.ids,
                prompt.choose,
                max_new_tokens=args.max_new_tokens,
                stop_id=tokenizer.eod,
                vocab_size=tokenizer.vocab_size,
                device=ctx.device,
            )
            show(number, prompt, new, tokenizer)
    finally:
        shut_down()


def show(number: int, prompt: Prompt, new: list[int], tokenizer: Tokenizer) -> None:
    """Print prompt number `number`, counted from 1, and its new tokens as text."""
    has_ended = bool(new) and new[-1] == tokenizer.eod
    if number > 1:
        print("---")
    print(tokenizer.decode(prompt.ids + (new[:-1] if has_ended else new)), flush=True)
    logger.info(
        "prompt %d: %d tokens, then %d new ones; stopped at the %s",
        number,
        len(prompt.ids),
        len(new),
        "end of the document" if has_ended else "limit",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that are wrong whatever the checkpoint holds.

    Raises:
        ConfigError: one of them is.
    """
    check_sampling(temperature=args.temperature, top_p=args.top_p)
    if args.max_new_tokens < 1:
        raise ConfigError(
            f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1; use 64, for example"
        )
    if environment_world_size() != 1:
        raise ConfigError(
            f"torchrun started {environment_world_size()} processes; text is generated in one;"
            " start the tool with python alone"
        )


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
    if data.tokenizer_model is None:
        raise ConfigError(
            f"{found.path} brings no tokenizer, because its run had no --tokenizer-model; text"
            " needs one; name the tokenizer that made the training data with --tokenizer-model"
        )
    return load_tokenizer(kind, str(found.path / Path(data.tokenizer_model).name))


def encode_prompts(
    args: argparse.Namespace, tokenizer: Tokenizer, *, seq_length: int
) -> list[Prompt]:
    """Tokens and sampling of every prompt; each has a generator of its own.

    Raises:
        ConfigError: a prompt is empty, or too long to be continued within `seq_length`, the
            length that the model was trained on.
    """
    prompts = []
    for index, text in enumerate(args.prompt):
        ids = tokenizer.encode(text)
        if not ids:
            raise ConfigError(
                f"--prompt number {index + 1} ({text!r}) has no tokens; the model continues at"
                " least one; give it some text"
            )
        if len(ids) + args.max_new_tokens > seq_length:
            raise ConfigError(
                f"--prompt number {index + 1} has {len(ids)} tokens and --max-new-tokens is"
                f" {args.max_new_tokens}; together they must be at most {seq_length}, the"
                " --seq-length of training; shorten the prompt or lower --max-new-tokens"
            )
        generator = torch.Generator().manual_seed(args.seed + index)
        prompts.append(Prompt(ids=ids, choose=make_choice(args, generator)))
    return prompts


def make_choice(args: argparse.Namespace, generator: torch.Generator) -> Choice:
    """How tokens are picked."""
    if args.greedy:
        return greedy_token
    return lambda logits: next_token(
        logits, temperature=args.temperature, top_p=args.top_p, generator=generator
    )


def build_forward(
    cfg: recipe.PretrainConfig, chunks: Sequence[torch.nn.Module], found: FoundCheckpoint
) -> Forward:
    """The model with the checkpoint's weights, as a function of tokens [1, s]."""
    (model,) = chunks
    if cfg.training.bf16:
        model.bfloat16()  # every parameter, as training has it
    load_weights([model], found)
    model.eval()
    logger.info("took the weights of %s", found.path)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]  # [1, s]
        logits: torch.Tensor = model(tokens, position_ids, None)  # [1, s, padded v]
        return logits

    return forward


if __name__ == "__main__":
    sys.exit(main())
