"""Evaluate a checkpoint on tasks of lm-evaluation-harness, alone or under torchrun.

    python tools/evaluate.py --load runs/quickstart/run --tasks arc_easy --task-data tasks \
        --output runs/quickstart/eval

Started again with the same --output, it goes on where it was interrupted. docs/evaluation.md says
how numbers are computed.
"""

import argparse
import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.trainer.checkpoint.manifest import MANIFEST_NAME
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import ConfigError
from megatron.trainer.io.hashing import file_sha256
from megatron.trainer.runtime.collective import on_rank0
from megatron.trainer.runtime.launch import environment_rank, run_main
from megatron.trainer.runtime.log import configure_logging
from moe_app.command_line import program
from moe_app.evaluate import own_flags
from moe_app.evaluate.answers import AnswerFile
from moe_app.evaluate.costs import model_costs
from moe_app.evaluate.suites import (
    JUDGED_TASKS,
    OLMES,
    SUITES,
    Suite,
    asks_in_conversations,
    named_suite,
)
from moe_app.evaluate.workers import Workers
from moe_app.infer import open_model
from moe_app.infer.conversations import Conversations
from moe_app.infer.stop import collect_stops

logger = logging.getLogger("evaluate")

ANSWERS_NAME = "answers.jsonl"
"""File of --output that keeps the model's answers."""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as `argv` says; return the exit status."""
    return run_main(lambda: run(open_model.parse(make_parser(), argv)))


def make_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = argparse.ArgumentParser(
        prog=program("evaluate"),
        description="Evaluate a checkpoint on tasks of lm-evaluation-harness.",
    )
    open_model.add_model_flags(parser)
    tasks = parser.add_argument_group("tasks")
    own_flags.add_task_flags(tasks)
    tasks.add_argument(
        "--task-data",
        metavar="DIR",
        help="read the tasks' datasets here, as fetch_tasks.py wrote them, not from the Hub",
    )
    tasks.add_argument(
        "--num-fewshot",
        type=own_flags.natural,
        metavar="N",
        help="examples in a prompt, not the task's own",
    )
    tasks.add_argument(
        "--limit", type=open_model.positive, metavar="N", help="the first items of each task alone"
    )
    tasks.add_argument(
        "--gen-kwargs", metavar="K=V,...", help="settings of generation, over the task's own"
    )
    tasks.add_argument(
        "--seed",
        type=own_flags.natural,
        default=1234,
        metavar="N",
        help="of examples and draws (%(default)s)",
    )
    tasks.add_argument(
        "--bootstrap-iters",
        type=own_flags.natural,
        default=1000,
        metavar="N",
        help="resamples for standard errors that have no formula (%(default)s)",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="gets results.json, samples_TASK.jsonl and the answers to go on from",
    )
    work.add_argument(
        "--max-length",
        type=open_model.positive,
        metavar="N",
        help="positions of a forward pass (--seq-length of training)",
    )
    work.add_argument(
        "--max-gen-toks",
        type=open_model.positive,
        default=256,
        metavar="N",
        help="new tokens where a task does not say (%(default)s)",
    )
    work.add_argument(
        "--prefix-token-id",
        type=own_flags.natural,
        metavar="ID",
        help="stands before a text without context (the tokenizer's BOS or end of document)",
    )
    open_model.add_tokens_per_batch(work)
    open_model.add_batch_size(work)
    own_flags.add_conversation_flag(tasks)
    own_flags.add_execution_flags(parser)
    own_flags.add_judge_flags(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the model and evaluate every task.

    Raises:
        UserError: a flag, a task, its data, the checkpoint or the tokenizer is invalid.
    """
    configure_logging(environment_rank())
    with open_model.joined_ranks(args):
        on_rank0("looking for lm-evaluation-harness", check_harness)
        tasks = on_rank0("choosing the tasks", lambda: _choose(args))
        opened = open_model.open_checkpoint(args, prog=program("evaluate"))
        on_workers(args, tasks, opened, functools.partial(_evaluate, args, tasks, opened))


def on_workers(
    args: argparse.Namespace,
    suite: Suite,
    opened: open_model.OpenedCheckpoint,
    evaluate: Callable[[Tokenizer, Workers, AnswerFile], None],
) -> None:
    """Load the model on all ranks, and evaluate on rank 0 while the others serve.

    Args:
        args: of the command line.
        suite: what is evaluated.
        opened: the checkpoint.
        evaluate: called on rank 0.
    """
    given = on_rank0("reading the tokenizer", lambda: _open_tokenizer(args, suite, opened))
    tokenizer, stop_ids = given
    loaded = open_model.load_model(args, opened)
    workers = Workers(
        loaded,
        tokenizer,
        stop_ids=stop_ids,
        tokens_per_batch=args.tokens_per_batch,
        batch_size=args.batch_size,
    )

    def on_first() -> None:
        with _on_the_others(workers), _open_answers(args, opened, tokenizer) as answers:
            evaluate(tokenizer, workers, answers)

    if environment_rank() != 0:
        workers.serve()
    on_rank0("evaluating", on_first)


def check_harness() -> None:
    """Refuse to begin where the harness is missing."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed; tasks run on lm-evaluation-harness; install it with"
            " pip install 'megatron-moe[eval]'"
        ) from error


def _choose(args: argparse.Namespace) -> Suite:
    """Return what to run, and make the output directory."""
    try:
        Path(args.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {args.output} cannot be made: {error.strerror}; results go there; name"
            " another directory"
        ) from error
    chosen = named_suite(args.tasks) if args.suite is None else SUITES[args.suite]
    if chosen.own and args.num_fewshot is not None:
        raise ConfigError(
            f"--num-fewshot is {args.num_fewshot}, but the prompts of {', '.join(chosen.own)} are"
            " those of the papers; leave it out, or evaluate other tasks"
        )
    if args.suite == OLMES and args.template is not None:
        raise ConfigError(
            f"--template is {args.template}, but the prompts of {OLMES} are published, and no"
            " conversations; leave it out, or evaluate other tasks"
        )
    judged = [name for name in chosen.own if name in JUDGED_TASKS]
    if judged:
        own_flags.judge_settings(args, ", ".join(judged))
    return chosen


def _has_conversations(args: argparse.Namespace, suite: Suite) -> bool:
    """Return whether a task is asked in conversations."""
    is_judged = any(name in JUDGED_TASKS for name in suite.own)
    return is_judged or asks_in_conversations(args, suite)


def _open_conversations(
    args: argparse.Namespace, opened: open_model.OpenedCheckpoint, tokenizer: Tokenizer
) -> "contextlib.closing[Conversations]":
    conversations = Conversations(
        args.template,
        tokenizer,
        checkpoint=opened.found.path,
        tokenizer_path=args.tokenizer_model,
    )
    return contextlib.closing(conversations)


def _open_tokenizer(
    args: argparse.Namespace, suite: Suite, opened: open_model.OpenedCheckpoint
) -> tuple[Tokenizer, Mapping[int, str]]:
    """Return the tokenizer, and the ids that end a text."""
    tokenizer = open_model.open_tokenizer(args, opened)
    nothing_more = argparse.Namespace(stop=[], stop_token_id=[])
    end = None
    if _has_conversations(args, suite):
        with _open_conversations(args, opened, tokenizer) as conversations:
            conversations.encode_user("?")
            end = conversations.find_end()
    return tokenizer, collect_stops(nothing_more, tokenizer, opened.found.path, turn_end=end).ids


@contextlib.contextmanager
def _on_the_others(workers: Workers) -> Iterator[None]:
    """Let the other ranks serve within the context, and go on after it."""
    try:
        yield
    finally:
        workers.close()


def _open_answers(
    args: argparse.Namespace, opened: open_model.OpenedCheckpoint, tokenizer: Tokenizer
) -> AnswerFile:
    """Open the file of answers, which are those of one model."""
    identity = {
        "checkpoint": file_sha256(opened.found.path / MANIFEST_NAME),
        "tokenizer": _tokenizer_digest(tokenizer),
        "precision": open_model.precision(args, opened.saved),
    }
    return AnswerFile(Path(args.output) / ANSWERS_NAME, identity)


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return what tells a tokenizer from others: the text of its tokens."""
    digest = hashlib.sha256()
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.token_text(token_id)
        digest.update(f"{token_id} {text!r}\n".encode("utf-8", errors="backslashreplace"))
    return digest.hexdigest()


def _evaluate(
    args: argparse.Namespace,
    suite: Suite,
    opened: open_model.OpenedCheckpoint,
    tokenizer: Tokenizer,
    workers: Workers,
    answers: AnswerFile,
) -> None:
    """Run the harness; on rank 0 alone."""
    from moe_app.evaluate.harness.olmes_run import evaluate_olmes
    from moe_app.evaluate.harness.own_run import check_own, evaluate_own
    from moe_app.evaluate.harness.run import (
        RESULTS_NAME,
        evaluate_suite,
        summary_lines,
        write_results,
    )

    length = args.max_length or opened.saved.training.seq_length
    info: dict[str, Any] = {
        "model": "megatron_moe",
        "checkpoint": str(opened.found.path),
        "iteration": opened.found.iteration,
        "max_length": length,
        **model_costs(opened.saved, opened.found.iteration),
    }
    found: dict[str, Any] = {"results": {}, "config": info, "limit": args.limit}
    with contextlib.ExitStack() as stack:
        conversations = None
        if _has_conversations(args, suite):
            conversations = stack.enter_context(_open_conversations(args, opened, tokenizer))
        model = harness_model(args, opened, tokenizer, workers, answers, conversations)
        check_own(model, suite, args)
        if args.suite == OLMES:
            found = evaluate_olmes(model, args, info)
        elif suite.tasks:
            found = evaluate_suite(model, suite, args, info)
        if suite.own:
            found["results"] |= evaluate_own(model, suite, args, conversations)
    write_results(Path(args.output), found)
    for line in summary_lines(found):
        logger.info("%s", line)
    logger.info("wrote %s", Path(args.output) / RESULTS_NAME)


def harness_model(
    args: argparse.Namespace,
    opened: open_model.OpenedCheckpoint,
    tokenizer: Tokenizer,
    workers: Workers,
    answers: AnswerFile,
    conversations: Conversations | None = None,
) -> Any:
    """Present the loaded model to the harness, as its `HarnessModel`; on rank 0 alone."""
    from moe_app.evaluate.harness.model import HarnessModel

    return HarnessModel(
        workers,
        tokenizer,
        answers,
        max_length=args.max_length or opened.saved.training.seq_length,
        max_gen_toks=args.max_gen_toks,
        prefix_token_id=_prefix(args, tokenizer),
        seed=args.seed,
        conversations=conversations,
    )


def _prefix(args: argparse.Namespace, tokenizer: Tokenizer) -> int:
    """Return the id before a text without context: as asked, the BOS, or the end of document."""
    chosen: int | None = args.prefix_token_id
    if chosen is None:
        chosen = tokenizer.prefix[0] if tokenizer.prefix else tokenizer.eod
    if chosen >= tokenizer.vocab_size:
        raise ConfigError(
            f"--prefix-token-id is {chosen}; the tokenizer has the ids 0 to"
            f" {tokenizer.vocab_size - 1}; name one of these"
        )
    return chosen
