"""Convert OLMoE, JetMoE and OLMo checkpoints between Hugging Face's format and ours.

    python tools/convert_checkpoint.py import --hf OLMoE-1B-7B-0924 --save runs/olmoe
    python tools/convert_checkpoint.py export --load runs/olmoe --hf OLMoE-exported

One process, a piece at a time: memory does not grow with the model. Nothing is overwritten, and an
interrupted conversion leaves nothing that looks valid. Exit status: 0; 1 when --verify finds a
difference above its tolerance; 2 when the conversion cannot be done; 130 when it is interrupted.
"""

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.trainer.checkpoint import (
    CheckpointReader,
    FoundCheckpoint,
    ManifestCheck,
    find_checkpoint,
    layout,
    streamed_checkpoint,
)
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import CheckpointError, ConfigError
from megatron.trainer.hf_files import (
    HFDirectory,
    HFWriter,
    new_directory,
    parse_size,
    plan_shards,
)
from megatron.trainer.hf_files.publish import check_new
from megatron.trainer.io.atomic_write import write_durably, write_text
from megatron.trainer.io.hashing import DigestThread
from megatron.trainer.records.run_dir import CONFIG_NAME
from megatron.trainer.runtime.log import configure_logging
from megatron.trainer.runtime.malloc import keep_freed_memory
from moe_app.command_line import program
from moe_app.convert.adapters import WeightReader, export_adapter
from moe_app.convert.arguments import parse_args
from moe_app.convert.chat_template import with_chat_template
from moe_app.convert.checks import (
    can_represent,
    check_new_run,
    check_outside,
    check_size,
    check_tensors,
    choose_weights,
    guard_disk_space,
    total_bytes,
)
from moe_app.convert.files import hf_files, native_files, read_auxiliary_files
from moe_app.convert.one_process import check_one_process, run_interruptible
from moe_app.convert.surplus import leave_out_surplus
from moe_app.convert.tokenizer_check import compare_with_transformers
from moe_app.convert.weights import Progress, TensorDigests, export_weights, import_weights
from moe_app.pretrain.config import PretrainConfig, read_saved_config
from moe_ext.config import MoEModelConfig
from moe_ext.convert import ExpertLayout, Family, Piece, family_for_model, family_from_config
from moe_ext.convert.peft_form import adapter_tensors

logger = logging.getLogger("convert")

REPORT_NAME = "conversion_report.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as `argv` says; return the exit status."""
    args = parse_args(argv)
    return run_interruptible(lambda: run(args))


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Records a finished conversion, for the report."""

    report: dict[str, Any]
    """The report so far."""
    report_path: Path
    """Path of the report."""
    native: FoundCheckpoint
    """The native checkpoint."""
    hf: Path
    """The Hugging Face directory."""
    is_exact: bool
    """Whether both sides hold the same values; False if one is rounded from the other."""
    tokenizer: Tokenizer | None = None
    """The trainer's tokenizer, of which an export holds another form."""
    num_rows: int = 0
    """Rows of the exported embedding."""


def run(args: argparse.Namespace) -> int:
    """Convert, write the report, and verify if requested; return the exit status.

    Raises:
        UserError: a flag, the source or the disk is unsuitable.
    """
    configure_logging(0)
    check_one_process("a conversion")
    if args.verify:
        from moe_app.convert.hf_verify import import_transformers, verify

        import_transformers()  # fail before the work if it is missing
    keep_freed_memory()
    began, num_threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)  # copying is memory-bound; more threads would only contend
    try:
        done = run_import(args) if args.command == "import" else run_export(args)
    finally:
        torch.set_num_threads(num_threads)
    report = {**done.report, "seconds": round(time.monotonic() - began, 1)}
    _write_report(done.report_path, report)
    logger.info(
        "%s: %d tensors, %.2f GB in %.0f s; report in %s",
        "imported" if args.command == "import" else "exported",
        report["num_tensors"],
        report["num_bytes"] / 1e9,
        report["seconds"],
        done.report_path,
    )
    if not args.verify:
        return 0
    verification = verify(done.native, done.hf, same_weights=done.is_exact)
    if done.tokenizer is not None:
        found = compare_with_transformers(done.tokenizer, done.hf, done.num_rows)
        passed = verification["passed"] and found["passed"]
        verification |= {"passed": passed, "tokenizer": found}
    _write_report(done.report_path, {**report, "verification": verification})
    return 0 if verification["passed"] else 1


def run_import(args: argparse.Namespace) -> Conversion:
    """Import a Hugging Face directory as a native checkpoint.

    Raises:
        UserError: the source or the disk is unsuitable.
    """
    save = Path(args.save)
    check_new_run(save)
    with HFDirectory(Path(args.hf)) as source:
        family, model = _read_architecture(source, args.make_vocab_size_divisible_by)
        left_out = leave_out_surplus(source, family.is_rotary_buffer, model)
        total = sum(entry.num_bytes for entry in source.tensors.values())
        check_size(model, total, config=source.path / "config.json")
        form = family.detect_layout(source.tensors)
        shapes = family.hf_tensors(model, form)
        dtype = check_tensors(source, shapes, args.dtype)
        pieces = list(family.pieces(model, form))
        native = {piece.key: piece.shape for piece in pieces}
        files = native_files(
            model,
            source.config,
            read_auxiliary_files(source.path),
            checkpoint=layout.final_path(save, 0),
            is_bf16=dtype is torch.bfloat16,
            source=str(source.path),
        )
        is_exact = all(can_represent(dtype, entry.dtype) for entry in source.tensors.values())
        with (
            guard_disk_space(save, native, dtype),
            DigestThread() as thread,
            Progress("import", total) as progress,
            streamed_checkpoint(
                save, 0, shapes=native, dtype=dtype, files=files, digests=thread
            ) as stream,
        ):
            digests = TensorDigests(thread if args.checksums or args.verify else None)
            import_weights(source, pieces, stream, dtype=dtype, digests=digests, progress=progress)
            sha256 = digests.finish()
    report = _report("import", family, form, dtype, num_tensors=len(shapes), num_bytes=total)
    report |= left_out | ({"sha256": sha256} if sha256 else {})
    found = FoundCheckpoint(path=layout.final_path(save, 0), iteration=0)
    return Conversion(
        report=report,
        report_path=save / REPORT_NAME,
        native=found,
        hf=Path(args.hf),
        is_exact=is_exact,
    )


def run_export(args: argparse.Namespace) -> Conversion:
    """Export a native checkpoint as a Hugging Face directory.

    Raises:
        UserError: a flag, the checkpoint or the disk is unsuitable.
    """
    out = Path(args.hf)
    check_new(out)
    max_bytes = parse_size(args.max_shard_size)
    found = find_checkpoint(Path(args.load), iteration=args.iteration, compare_contents=False)
    check_outside(out, found.path)
    cfg = read_saved_config(
        found.path / CONFIG_NAME, prog=program("convert_checkpoint", command="convert")
    )
    with CheckpointReader(found.path) as reader:
        check_size(cfg.model, reader.num_bytes, config=found.path / CONFIG_NAME)
        family, form, pieces = _plan_export(cfg.model, args.layout, found)
        weights, dtype, weights_source = _open_weights(cfg, reader, pieces, args.dtype)
        if args.adapter:
            return _export_adapter(args, weights, family, dtype, found)
        logger.info("%s: exporting the %s", found.path, weights_source)
        exported = hf_files(
            family,
            cfg,
            found.path,
            like=Path(args.like) if args.like is not None else None,
            dtype=str(dtype).removeprefix("torch."),
            with_tokenizer=not args.no_tokenizer,
        )
        exported = with_chat_template(exported, args.chat_template, found.path)
        shapes = {part.name: part.shape for piece in pieces for part in piece.sources}
        total = total_bytes(shapes, dtype)
        with (
            guard_disk_space(out, shapes, dtype),
            DigestThread() as thread,
            Progress("export", total) as progress,
            new_directory(out) as directory,
        ):
            for name, content in exported.files.items():
                write_durably(directory / name, content)
            plans = plan_shards(shapes, dtype, max_bytes=max_bytes)
            digests = TensorDigests(thread if args.checksums or args.verify else None)
            check = ManifestCheck(reader, thread)
            with HFWriter(directory, plans, dtype) as writer:
                export_weights(
                    reader,
                    check,
                    pieces,
                    writer,
                    keys=weights.keys,
                    read=weights.read,
                    dtype=dtype,
                    digests=digests,
                    progress=progress,
                )
                writer.finish()
                check.finish()
                sha256 = digests.finish()
    report = _report("export", family, form, dtype, num_tensors=len(shapes), num_bytes=total)
    report |= {"iteration": found.iteration, "weights": weights_source, **exported.report}
    report |= {"sha256": sha256} if sha256 else {}
    stored = torch.bfloat16 if cfg.training.bf16 else torch.float32
    return Conversion(
        report=report,
        report_path=out / REPORT_NAME,
        native=found,
        hf=out,
        is_exact=can_represent(dtype, stored)
        and all(key == kept for key, kept in weights.keys.items())
        and (weights.lora is None or dtype is torch.float32),
        tokenizer=exported.tokenizer,
        num_rows=cfg.model.vocab_size,
    )


def _open_weights(
    cfg: PretrainConfig, reader: CheckpointReader, pieces: list[Piece], requested: str | None
) -> tuple[WeightReader, torch.dtype, str]:
    """Return what reads the weights to export, the dtype to write, and a description."""
    lora = cfg.trainable.lora
    shapes = {piece.key: piece.shape for piece in pieces}
    shapes |= adapter_tensors(shapes, cfg.model, lora)
    keys, dtype, source = choose_weights(
        reader,
        shapes,
        requested,
        is_frozen=lambda name: cfg.trainable.is_frozen(name, cfg.model),
    )
    told = source if lora is None else f"{source} with LoRA of rank {lora.rank} merged into them"
    return WeightReader(reader=reader, keys=keys, model=cfg.model, lora=lora), dtype, told


def _export_adapter(
    args: argparse.Namespace,
    weights: WeightReader,
    family: Family,
    dtype: torch.dtype,
    found: FoundCheckpoint,
) -> Conversion:
    """Export the adapters alone.

    Raises:
        UserError: there are none, or a flag or the disk is unsuitable.
    """
    if args.verify:
        raise ConfigError(
            "--verify compares whole models, and --adapter exports none; export without --adapter"
            " to compare the model with its adapters merged"
        )
    out = Path(args.hf)
    done = export_adapter(weights, out, family=family.name, dtype=dtype, base=args.base)
    report = _report("export", family, family.layouts[0], dtype, **done)
    report |= {"iteration": found.iteration, "weights": "adapters for peft"}
    return Conversion(
        report=report, report_path=out / REPORT_NAME, native=found, hf=out, is_exact=True
    )


def _read_architecture(source: HFDirectory, divisor: int) -> tuple[Family, MoEModelConfig]:
    """Return the family and the native config of a Hugging Face checkpoint.

    Args:
        source: the checkpoint.
        divisor: the vocabulary is padded to a multiple of this.

    Raises:
        CheckpointError: the family or one of its features is not supported.
    """
    try:
        family = family_from_config(source.config)
        return family, family.model_config(source.config, make_vocab_size_divisible_by=divisor)
    except ValueError as error:
        raise CheckpointError(f"{source.path / 'config.json'}: {error}") from error


def _plan_export(
    model: MoEModelConfig, requested: ExpertLayout | None, found: FoundCheckpoint
) -> tuple[Family, ExpertLayout, list[Piece]]:
    """Return the family, layout and pieces of a native model.

    Raises:
        CheckpointError: no family can express it.
        ConfigError: the family has no such layout.
    """
    try:
        family = family_for_model(model)
    except ValueError as error:
        raise CheckpointError(f"{found.path} cannot be exported: {error}") from error
    form = requested or family.layouts[0]
    try:
        return family, form, list(family.pieces(model, form))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _report(
    command: str,
    family: Family,
    form: ExpertLayout,
    dtype: torch.dtype,
    *,
    num_tensors: int,
    num_bytes: int,
) -> dict[str, Any]:
    """Return what every conversion reports; sizes are of the Hugging Face side."""
    return {
        "command": command,
        "family": family.name,
        "layout": form,
        "dtype": str(dtype).removeprefix("torch."),
        "num_tensors": num_tensors,
        "num_bytes": num_bytes,
    }


def _write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report atomically.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        write_text(path, json.dumps(report, indent=2) + "\n", durable=True)
    except OSError as error:
        raise CheckpointError(
            f"{path.parent} is complete, but its report {path.name} cannot be written:"
            f" {error.strerror}; free some space, and to get a report remove the directory"
            " and convert again"
        ) from error
