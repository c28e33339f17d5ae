"""Runs a model over texts and writes what its routers chose, alone or under torchrun."""

import argparse
import functools
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.trainer.checkpoint.saved_run import RUN_NAME
from megatron.trainer.data.indexed import open_tokens
from megatron.trainer.data.token_manifest import check_manifests
from megatron.trainer.errors import ConfigError
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.io.bounded_read import read_small
from megatron.trainer.runtime.collective import (
    gather,
    gather_on_rank0,
    on_all_ranks,
    on_rank0,
)
from megatron.trainer.runtime.launch import environment_rank
from megatron.trainer.runtime.log import configure_logging
from moe_app.analyze.capture import RoutingCapture, ShardPart, run_windows
from moe_app.analyze.hf_source import fill_from_hf, hash_model, open_hf
from moe_app.analyze.manifest import TOKENS_NAME, Manifest, Router
from moe_app.analyze.shard_file import check_pyarrow
from moe_app.analyze.shard_writer import ShardWriter, routers_of
from moe_app.analyze.texts import (
    Domain,
    Window,
    cut_windows,
    group_windows,
    parse_domains,
    token_blocks,
)
from moe_app.command_line import program
from moe_app.infer import open_model
from moe_app.infer.open_model import LoadedModel, OpenedCheckpoint
from moe_ext.analysis.model_routers import find_routers

logger = logging.getLogger("analyze")

SHARD_TOKENS = 1 << 17
_MOST_JSON_BYTES = 1 << 27


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `collect`."""
    open_model.add_model_flags(parser, with_hf=True)
    data = parser.add_argument_group("data", "Texts by name; documents are read one after another.")
    data.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="JSON Lines, plain, gzip or zstd",
    )
    data.add_argument(
        "--data-path",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PREFIX",
        help="token files, as tools/preprocess_data.py writes them",
    )
    data.add_argument(
        "--json-key", default="text", metavar="KEY", help="of the text in a line (%(default)s)"
    )
    data.add_argument(
        "--seq-length",
        type=open_model.positive,
        metavar="N",
        help="tokens that the model sees at once; without it as in training",
    )
    data.add_argument(
        "--tokens-per-domain",
        type=open_model.positive,
        metavar="N",
        help="take so many tokens of each text, rounded up to whole sequences",
    )
    data.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="where the routing is kept; an interrupted collection there is continued",
    )
    open_model.add_tokens_per_batch(data, default=4096)
    data.add_argument(
        "--shard-tokens",
        type=open_model.positive,
        default=SHARD_TOKENS,
        metavar="N",
        help="tokens of a file (%(default)s); memory grows with it",
    )


def run(args: argparse.Namespace) -> None:
    """Collect the routing of all texts.

    Raises:
        UserError: a flag, a text, the checkpoint or the output is unsuitable.
    """
    configure_logging(environment_rank())
    with open_model.joined_ranks(args):
        collect(args)


def collect(args: argparse.Namespace) -> None:
    """Collect the routing of all texts with ranks that have joined; a collective call.

    Raises:
        UserError: a flag, a text, the checkpoint or the output is unsuitable.
    """
    on_all_ranks("looking for pyarrow", check_pyarrow)
    domains = parse_domains(args.data, args.data_path)
    is_hf = args.hf is not None
    opened = open_hf(args) if is_hf else open_model.open_checkpoint(args, prog=program("analyze"))
    _check_flags(args, opened)
    for note in on_rank0("checking the token files", lambda: _check_files(args, opened, domains)):
        logger.info("%s", note)
    tokenizer = functools.cache(lambda: open_model.open_tokenizer(args, opened))
    model = open_model.load_model(args, opened, **({"fill": fill_from_hf} if is_hf else {}))
    if opened.saved.model.moe_share_across_layers:
        raise ConfigError(
            "moe_share_across_layers is True: layers share one router, and the analysis tells"
            " routers by their layers; analyze a model without it"
        )
    routers = find_routers(model.module)
    described = routers_of(_all_routers(routers))
    writer = on_rank0_only(
        "opening the output",
        lambda: ShardWriter(Path(args.output), _settings(args, opened, domains, described)),
    )
    with RoutingCapture(routers).observing() as capture:
        _collect(args, opened, domains, tokenizer, model, capture, writer)
    on_rank0("finishing the output", lambda: _finish(args, opened, tokenizer, writer))


def on_rank0_only(stage: str, work: Any) -> Any:
    """Return the result of `work` on rank 0, and None elsewhere; it need not pickle."""
    return on_all_ranks(stage, lambda: work() if environment_rank() == 0 else None)


def _collect(
    args: argparse.Namespace,
    opened: OpenedCheckpoint,
    domains: list[Domain],
    tokenizer: Any,
    model: LoadedModel,
    capture: RoutingCapture,
    writer: ShardWriter,
) -> None:
    """Run the passes over what is not there yet, a shard at a time."""
    started, done = time.perf_counter(), 0
    pending = _pending(args, opened, domains, tokenizer, writer)
    while windows := on_rank0("reading the texts", lambda: next(pending, None)):
        done += _collect_shard(args, windows, model, capture, writer)
        logger.info(
            "%s tokens collected, %.0f per second",
            f"{done:,}",
            done / (time.perf_counter() - started),
        )


def _collect_shard(
    args: argparse.Namespace,
    windows: list[Window],
    model: LoadedModel,
    capture: RoutingCapture,
    writer: ShardWriter,
) -> int:
    """Run the passes of a shard and write it, so that nothing of it is left for the next one."""
    part = run_windows(
        model.parallel,
        capture,
        windows,
        tokens_per_batch=args.tokens_per_batch,
        rank=model.ctx.data_parallel_rank,
        size=model.ctx.layout.data,
        is_kept=model.ctx.groups.tp.rank() == 0,
    )
    parts = gather_on_rank0(part)
    on_rank0("writing the shard", functools.partial(_write, writer, windows, parts))
    return sum(len(window.tokens) for window in windows)


def _write(writer: ShardWriter, windows: list[Window], parts: list[ShardPart]) -> None:
    writer.write(windows, parts)


def _pending(
    args: argparse.Namespace,
    opened: OpenedCheckpoint,
    domains: list[Domain],
    tokenizer: Any,
    writer: ShardWriter,
) -> Iterator[list[Window]]:
    """Yield on rank 0 the windows of every shard that is not there yet."""
    if writer is None:
        return
    length = args.seq_length or opened.saved.training.seq_length
    windows = (
        window
        for number, domain in enumerate(domains)
        for window in cut_windows(
            token_blocks(
                domain,
                key=args.json_key,
                vocab_size=opened.saved.model.vocab_size,
                tokenizer=tokenizer,
            ),
            domain=number,
            length=length,
            limit=args.tokens_per_domain,
        )
    )
    skipped = 0
    for group in group_windows(windows, num_tokens=args.shard_tokens):
        if writer.is_finished(group):
            skipped += 1
            continue
        if skipped:
            logger.info("%d shards are there already", skipped)
            skipped = 0
        yield group


def _check_flags(args: argparse.Namespace, opened: OpenedCheckpoint) -> None:
    trained = opened.saved.training.seq_length
    if args.seq_length is not None and args.seq_length > trained:
        raise ConfigError(
            f"--seq-length is {args.seq_length}, but the model was trained on sequences of"
            f" {trained}; longer ones are not seen as in training; give at most {trained}"
        )


def _check_files(
    args: argparse.Namespace, opened: OpenedCheckpoint, domains: list[Domain]
) -> list[str]:
    """Check token files against their manifests, and these against the model and its tokenizer.

    Returns:
        What is worth a line in the log.
    """
    size = opened.saved.model.vocab_size
    paths = [domain.path for domain in domains if domain.is_tokens]
    try:
        kind, tokenizer = open_model.place_tokenizer(opened.saved.data, opened.found, args)
    except ConfigError:  # none to compare with; `_finish` logs it
        kind, tokenizer = opened.saved.data.tokenizer_type, None
    return check_manifests(
        {path: open_tokens(path, vocab_size=size).facts for path in paths},
        tokenizer_type=kind,
        tokenizer_model=tokenizer,
        vocab_size=size,
        eod=None,
    )


def _all_routers(mine: Any) -> dict[tuple[str, int], tuple[int, int]]:
    """Return experts and k of all pipeline stages' routers; a collective call."""
    sizes = {name: (router.num_experts, router.topk) for name, router in mine.items()}
    return {name: size for each in gather(sizes) for name, size in each.items()}


def _settings(
    args: argparse.Namespace,
    opened: OpenedCheckpoint,
    domains: list[Domain],
    routers: tuple[Router, ...],
) -> Manifest:
    """Describe the collection that is asked for, without its shards."""
    path = opened.found.path
    iteration, consumed = opened.found.iteration, _consumed_tokens(path / RUN_NAME)
    if args.hf is not None:
        iteration, consumed = position_of_name(path.resolve().name)
    return Manifest(
        source=str(path),
        source_kind="native" if args.hf is None else "hf",
        model_hash=hash_model(path, is_hf=args.hf is not None),
        iteration=iteration,
        consumed_tokens=consumed,
        precision=open_model.precision(args, opened.saved),
        vocab_size=opened.saved.model.vocab_size,
        routers=routers,
        domains=tuple(domain.name for domain in domains),
        paths=tuple(domain.path for domain in domains),
        seq_length=args.seq_length or opened.saved.training.seq_length,
        tokens_per_domain=args.tokens_per_domain or 0,
        shard_tokens=args.shard_tokens,
    )


def position_of_name(name: str) -> tuple[int, int]:
    """Return the iteration and tokens that OLMoE's names of checkpoints have; 0 and -1 if none.

    Args:
        name: of a directory, such as step5000-tokens20B.
    """
    found = re.fullmatch(r".*?step(\d{1,15})(?:-tokens(\d{1,9})B)?", name)
    if found is None:
        return 0, -1
    return int(found[1]), -1 if found[2] is None else int(found[2]) * 10**9


def _consumed_tokens(path: Path) -> int:
    """Return the tokens that a checkpoint's run had consumed; -1 if that is not known."""
    try:
        data = json.loads(read_small(path, most_bytes=_MOST_JSON_BYTES)).get("data") or {}
        return int(data["consumed_samples"]) * int(data["seq_length"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return -1  # weights alone, as an import writes them


def _finish(
    args: argparse.Namespace, opened: OpenedCheckpoint, tokenizer: Any, writer: ShardWriter
) -> None:
    """Write how the tokens are written, where that is known, and mark the collection complete."""
    try:
        known = tokenizer()
    except ConfigError as error:
        if args.data:
            raise
        logger.info("tokens will be shown by their ids: %s", error)
    else:
        size = opened.saved.model.vocab_size
        texts = [known.token_text(token) for token in range(size)]
        content = json.dumps([text if text is not None else "" for text in texts])
        write_text(Path(args.output) / TOKENS_NAME, content + "\n", durable=True)
    writer.finish()
    manifest = writer.manifest
    logger.info(
        "%s: %s tokens of %s, %d shards, %d routers",
        args.output,
        f"{manifest.num_tokens:,}",
        ", ".join(manifest.domains),
        len(manifest.shards),
        len(manifest.routers),
    )
