"""Continue prompts with a trained model, alone or under torchrun, under any layout.

    python tools/generate.py --load runs/quickstart --prompt "def main(" --prompt "import "

The model and its tokenizer come from the checkpoint. The text goes to standard output or, as JSON
Lines, to a file; everything else to standard error. docs/inference.md has more examples.
"""

import argparse
import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import ConfigError
from megatron.trainer.inference.decode import Prompt, cache_capacity, generate
from megatron.trainer.inference.lines import OutputFile
from megatron.trainer.inference.sampling import (
    TokenSampler,
    check_sampling,
    greedy_token,
    next_token,
)
from megatron.trainer.runtime.collective import on_all_ranks, on_rank0
from megatron.trainer.runtime.launch import environment_rank, run_main
from megatron.trainer.runtime.log import configure_logging
from moe_app.command_line import argument_text, program
from moe_app.infer import open_model
from moe_app.infer.conversations import add_template_flag
from moe_app.infer.prompts import GenerationInput, GenerationTask, read_input
from moe_app.infer.stop import Ending, Stops, add_stop_flags
from moe_ext.attention.cache import KeyValueCache
from moe_ext.attention.core import use_cache

logger = logging.getLogger("generate")

_LARGEST_SEED = 1 << 62
_DUMMY_PROMPT = Prompt(ids=[0], sample=greedy_token, max_new_tokens=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Generate as `argv` says; return the exit status."""
    return run_main(lambda: run(open_model.parse(make_parser(), argv)))


def make_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = argparse.ArgumentParser(
        prog=program("generate"),
        description="Continue prompts with a trained model, alone or under torchrun.",
    )
    open_model.add_model_flags(parser)
    text = parser.add_argument_group("text")
    source = text.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt",
        action="append",
        type=argument_text,
        metavar="TEXT",
        help="text to continue, or with --template what a user says; may be given several times",
    )
    source.add_argument(
        "--input",
        metavar="FILE",
        help='JSON Lines, each {"prompt": TEXT}, {"messages": [{"role": R, "content": TEXT}, ...]}'
        ' or {"tokens": [ID, ...]}; gzip and zstd, too; - is standard input',
    )
    add_template_flag(text)
    text.add_argument(
        "--output",
        metavar="FILE",
        help="write the objects here, with what was added, instead of printing text",
    )
    open_model.add_batch_size(text)
    add_sampling_flags(parser)
    add_stop_flags(parser)
    return parser


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for length and sampling."""
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add (%(default)s)"
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="divides the logits (%(default)s)",
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw from the likeliest tokens that together have this probability (%(default)s)",
    )
    sampling.add_argument(
        "--top-k",
        type=int,
        metavar="N",
        help="draw from so many of the likeliest tokens, before --top-p; without it from all",
    )
    sampling.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    sampling.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="of the first prompt (%(default)s); the second has the next number, and so on",
    )


def run(args: argparse.Namespace) -> None:
    """Load the model and continue every prompt.

    Raises:
        UserError: a flag, the input, the checkpoint or the tokenizer is invalid.
    """
    configure_logging(environment_rank())
    check_arguments(args)
    with open_model.joined_ranks(args), contextlib.ExitStack() as stack:
        opened = open_model.open_checkpoint(args, prog=program("generate"))
        # Opened on rank 0 alone: the others get tokens.
        tokenizer = functools.cache(lambda: open_model.open_tokenizer(args, opened))
        given = on_rank0("reading the prompts", lambda: read_input(args, opened, tokenizer()))
        output = on_all_ranks("opening the output", lambda: open_output(args))
        if output is not None:
            stack.enter_context(output)
        loaded = open_model.load_model(args, opened)
        prompts = make_prompts(args, given)
        per_round = args.batch_size * loaded.ctx.layout.data
        for start in range(0, len(prompts), per_round):
            part = slice(start, start + per_round)
            added = generate_round(
                loaded, prompts[part], stop_ids=given.stops.ids, vocab_size=given.vocab_size
            )
            on_all_ranks(
                "writing the texts",
                functools.partial(
                    write_round,
                    start,
                    given.tasks[part],
                    added,
                    stops=given.stops,
                    tokenizer=tokenizer,
                    output=output,
                ),
            )
        on_all_ranks("writing the texts", lambda: output.finish() if output is not None else None)


def generate_round(
    loaded: open_model.LoadedModel,
    prompts: Sequence[Prompt],
    *,
    stop_ids: Collection[int],
    vocab_size: int,
) -> list[list[int]]:
    """Continue a few prompts on all ranks; a collective call.

    Args:
        loaded: the model.
        prompts: distributed to the data parallel ranks round-robin.
        stop_ids: ids that end a text.
        vocab_size: ids of the tokenizer are below it.

    Returns:
        Each prompt's new tokens, on every rank.
    """
    ctx = loaded.ctx
    numbers = range(ctx.data_parallel_rank, len(prompts), ctx.layout.data)
    mine = [prompts[number] for number in numbers] or [_DUMMY_PROMPT]
    cache = KeyValueCache(batch_size=len(mine), capacity=cache_capacity(mine))
    with use_cache(loaded.module, cache):
        new = generate(
            open_model.CachedModel(loaded, cache),
            mine,
            stop_ids=stop_ids,
            vocab_size=vocab_size,
        )
    found = dict(zip(numbers, new, strict=False)) if loaded.parallel.is_output_rank else {}
    gathered: list[dict[int, list[int]]] = [{} for _ in range(ctx.world_size)]
    dist.all_gather_object(gathered, found)
    merged = {number: ids for each in gathered for number, ids in each.items()}
    return [merged[number] for number in range(len(prompts))]


def write_round(
    start: int,
    tasks: Sequence[GenerationTask],
    added: Sequence[list[int]],
    *,
    stops: Stops,
    tokenizer: Callable[[], Tokenizer],
    output: OutputFile | None,
) -> None:
    """Write the completions of some tasks, numbered after `start`; on rank 0 only."""
    if environment_rank() == 0:
        for number, (task, new) in enumerate(zip(tasks, added, strict=True), start=start + 1):
            ending = stops.find(tokenizer(), task.ids, new)
            if output is None:
                if number > 1:
                    print("---")
                print(("" if task.is_conversation else ending.prompt) + ending.text, flush=True)
            else:
                output.write_record({**task.record, **outcome(new, ending)})
            logger.info(
                "prompt %d: %d tokens, then %d new ones; stopped at %s",
                number,
                len(task.ids),
                len(new),
                ending.description,
            )


def outcome(new: list[int], ending: Ending) -> dict[str, Any]:
    """Return what `--output` adds to an object; see OUTPUT_KEYS."""
    return {
        "completion": ending.text,
        "completion_tokens": new,
        "finish_reason": "length" if ending.reason is None else "stop",
        "stop_reason": ending.reason,
    }


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that are invalid for any checkpoint.

    Raises:
        ConfigError: one is.
    """
    check_sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    if args.max_new_tokens < 1:
        raise ConfigError(
            f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1; use 64, for example"
        )
    if not 0 <= args.seed <= _LARGEST_SEED:
        raise ConfigError(
            f"--seed is {args.seed}; it must be 0 to 2^62, leaving room for one seed per prompt;"
            " use a smaller one"
        )


def make_prompts(args: argparse.Namespace, given: GenerationInput) -> list[Prompt]:
    """Give every task a generator of its own."""
    return [
        Prompt(
            ids=task.ids,
            sample=make_sampler(args, torch.Generator().manual_seed(args.seed + index)),
            max_new_tokens=args.max_new_tokens,
            ends=functools.partial(given.stops.ends, task.ids) if given.stops.texts else None,
        )
        for index, task in enumerate(given.tasks)
    ]


def make_sampler(args: argparse.Namespace, generator: torch.Generator) -> TokenSampler:
    """Return the function that picks tokens."""
    if args.greedy:
        return greedy_token
    return lambda logits: next_token(
        logits,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        generator=generator,
    )


def open_output(args: argparse.Namespace) -> OutputFile | None:
    """Open the output file on rank 0, if one is requested."""
    if args.output is None or environment_rank() != 0:
        return None
    return OutputFile(args.output)
