"""Gives the reference's log-probabilities: of a frozen model in memory, or kept on disk.

The file is one array [rows, 3] of fp32, NaN where a row has no text of that role, and a description
of what computed it. A file of another reference or of other texts is refused.
"""

import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from megatron.trainer.checkpoint import FoundCheckpoint, find_checkpoint
from megatron.trainer.checkpoint.manifest import MANIFEST_NAME
from megatron.trainer.checkpoint.saved_run import check_architecture, saved_config
from megatron.trainer.data.batch import Batch
from megatron.trainer.data.batch_views import separate_documents, shard_positions
from megatron.trainer.data.source import RowSource
from megatron.trainer.errors import CheckpointError, DataError
from megatron.trainer.io.atomic_write import atomic_write, write_text
from megatron.trainer.io.hashing import file_sha256
from megatron.trainer.resume import load_weights
from megatron.trainer.runtime.collective import gather_on_rank0, on_rank0
from megatron.trainer.state import TrainState
from moe_app.align.align_config import AlignConfig
from moe_app.align.preference import References, log_probs_of, with_sizes
from moe_app.pretrain.build import build_chunks
from moe_app.pretrain.trainable import saved_trainable

logger = logging.getLogger("align")

VALUES_NAME, FACTS_NAME = "reference.npy", "reference.json"
_ROLES = 3

Facts = Mapping[str, Any]
"""What kept log-probabilities follow from, by name; JSON values."""


def find_reference(cfg: AlignConfig) -> FoundCheckpoint:
    """Find the checkpoint of the reference; a collective call.

    Raises:
        CheckpointError: there is none, or it is of another architecture.
    """
    align, checkpoint = cfg.align, cfg.checkpoint
    root = Path(align.reference_load or checkpoint.load or "")
    is_same = align.reference_load is None
    step = align.reference_ckpt_step
    if step is None and is_same:
        step = checkpoint.ckpt_step
    if is_same and not cfg.checkpoint.finetune:
        raise CheckpointError(
            f"--load {checkpoint.load} is the run itself, which is no reference; name the model"
            " that it began from with --reference-load"
        )
    found = find_checkpoint(root, iteration=step)
    on_rank0(
        f"reading the configuration in {found.path}",
        lambda: check_architecture(found, cfg.model),
    )
    return found


def identity_of(found: FoundCheckpoint) -> dict[str, str]:
    """Return where a checkpoint is, and what tells it from others."""
    return {"path": str(found.path), "sha256": file_sha256(found.path / MANIFEST_NAME)}


def load_reference(cfg: AlignConfig, state: TrainState, found: FoundCheckpoint) -> list[nn.Module]:
    """Build the frozen reference in the run's layout and precision; a collective call."""
    # The reference has its own adapters, or none, whatever the policy trains.
    trained, lacking = on_rank0(
        f"reading the configuration in {found.path}",
        lambda: (
            saved_trainable(saved_config(found)),
            tuple(check_architecture(found, cfg.model).values()),
        ),
    )
    built = build_chunks(dataclasses.replace(cfg, trainable=trained), state.ctx, seed=None)
    modules: list[nn.Module] = list(built.chunks)
    load_weights(modules, found, lacking=lacking)  # biases of experts are built as 0
    for module in modules:
        module.requires_grad_(False)
        module.eval()
    if not cfg.training.bf16:
        return modules
    return [Float16Module(built.config, module) for module in modules]


@dataclass(frozen=True, kw_only=True)
class LiveReference:
    """Asks a frozen model about each global batch."""

    chunks: Sequence[nn.Module]
    """This rank's part of it."""
    is_average: bool
    """Divide by the number of counted tokens."""

    def __call__(self, state: TrainState, batches: Sequence[Batch]) -> list[Tensor]:
        """Return [n] log-probabilities of each micro-batch's texts."""
        return log_probs_of(state, self.chunks, batches, is_average=self.is_average)


@dataclass(frozen=True, kw_only=True)
class KeptReference:
    """Looks log-probabilities up by the row and the role of a text."""

    values: Sequence[npt.NDArray[np.float32]]
    """[rows, 3] sums of log-probabilities, by the number of the set of texts."""
    is_average: bool
    """Divide by the number of counted tokens."""

    def __call__(self, state: TrainState, batches: Sequence[Batch]) -> list[Tensor]:
        """Return [n] log-probabilities of each micro-batch's texts."""
        return [self._find(batch) for batch in batches]

    def _find(self, batch: Batch) -> Tensor:
        texts = batch.texts
        values = self.values[int(texts["set"][0])]
        kept = values[texts["index"].cpu().numpy(), texts["role"].cpu().numpy()]
        found = torch.from_numpy(kept).to(batch.tokens.device)
        return found / texts["sizes"].clamp(min=1.0) if self.is_average else found


def keep_reference(
    cfg: AlignConfig, state: TrainState, found: FoundCheckpoint, sources: Mapping[str, RowSource]
) -> References:
    """Compute the log-probabilities of all texts, or read them; a collective call.

    Args:
        cfg: of the run.
        state: of the run.
        found: the reference.
        sources: the sets of texts by name, in the order of their numbers.

    Raises:
        DataError: the directory has those of another reference or of other texts.
    """
    root = Path(cfg.align.reference_cache or "")
    facts = on_rank0("reading the reference", lambda: _facts(cfg, found, sources))
    missing = on_rank0("looking for the reference", lambda: _missing(root, facts))
    computed: dict[str, npt.NDArray[np.float32]] = {}
    if missing:
        chunks = load_reference(cfg, state, found)
        for name in missing:
            values = computed[name] = _compute(cfg, state, chunks, sources[name])
            on_rank0(
                "keeping the reference",
                partial(_write, root / name, values, facts[name]),
            )
    # What this run computed is not read again: another run may have written since.
    kept = on_rank0(
        "reading the reference",
        lambda: [
            computed[name] if name in computed else _read(root / name, facts[name])
            for name in sources
        ],
    )
    return KeptReference(values=kept, is_average=cfg.align.average_log_prob)


def _facts(
    cfg: AlignConfig, found: FoundCheckpoint, sources: Mapping[str, RowSource]
) -> dict[str, Facts]:
    """Return what the log-probabilities of each set of texts follow from."""
    return {
        name: {
            "reference": identity_of(found)["sha256"],
            "texts": source.fingerprint,
            "seq_length": cfg.training.seq_length,
            "precision": "bf16" if cfg.training.bf16 else "fp32",
        }
        for name, source in sources.items()
    }


def _missing(root: Path, facts: Mapping[str, Facts]) -> list[str]:
    """Return the sets without values; refuse those of something else."""
    missing = []
    for name, wanted in facts.items():
        if (root / name / FACTS_NAME).is_file():
            _read_facts(root / name, wanted)
        else:
            missing.append(name)
    return missing


def _read_facts(folder: Path, wanted: Facts) -> dict[str, Any]:
    """Return the description of kept values.

    Raises:
        DataError: it cannot be read, or is of something else than what is wanted.
    """
    path = folder / FACTS_NAME
    try:
        kept = json.loads(path.read_text("utf-8"))
        if not isinstance(kept, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no description of a reference: {error}; remove it") from error
    changed = [key for key in wanted if kept.get(key) != wanted[key]]
    if changed:
        raise DataError(
            f"{path} is of another reference: its {changed[0]} is {kept.get(changed[0])}, and this"
            f" run's {wanted[changed[0]]}; log-probabilities are of one model and one set of texts;"
            " name another --reference-cache, or remove it"
        )
    return kept


def _compute(
    cfg: AlignConfig, state: TrainState, chunks: Sequence[nn.Module], source: RowSource
) -> npt.NDArray[np.float32]:
    """Return [rows, 3] log-probabilities of a set of texts, on rank 0; a collective call."""
    ctx, size = state.ctx, cfg.training.micro_batch_size
    total = int(source.num_windows or 0)
    # As many micro-batches as stages, without which an interleaved pipeline does not run.
    per_batch = size * ctx.layout.data
    per_round = per_batch * ctx.layout.pipeline
    ask = LiveReference(chunks=chunks, is_average=False)
    kept: list[tuple[list[int], list[int], list[float]]] = []
    for start in range(0, total, per_round):
        batches = []
        for first in range(start + ctx.data_parallel_rank * size, start + per_round, per_batch):
            # Every rank makes each pass: beyond the end it repeats the last sample.
            numbers = [min(number, total - 1) for number in range(first, first + size)]
            batch = source.read_rows(numbers, pin_memory=False).to(ctx.device)
            batches.append(_placed(state, with_sizes(batch)))
        for batch, log_probs in zip(batches, ask(state, batches), strict=True):
            if len(log_probs):
                texts = batch.texts
                kept.append((texts["index"].tolist(), texts["role"].tolist(), log_probs.tolist()))
    triples = [each for part in gather_on_rank0(kept) for each in part]
    if ctx.rank != 0:
        return np.empty((0, _ROLES), np.float32)
    rows = 1 + max(max(index) for index, _, _ in triples)
    values = np.full((rows, _ROLES), np.nan, np.float32)
    for index, role, log_prob in triples:
        values[index, role] = log_prob
    return values


def _placed(state: TrainState, batch: Batch) -> Batch:
    """Return this rank's positions, in which texts are kept apart."""
    assert state.documents is not None  # a source of texts has them
    whole = separate_documents(batch, state.documents)
    group = state.ctx.groups.cp
    return shard_positions(whole, rank=group.rank(), size=group.size())


def _write(folder: Path, values: npt.NDArray[np.float32], facts: Facts) -> None:
    """Write values, and last what they are of."""
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    # Of what is written, not of what is on disk: another run may write there, too.
    named = {**facts, "sha256": hashlib.sha256(content.getbuffer()).hexdigest()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / VALUES_NAME, durable=True) as file:
            file.write(content.getbuffer())
        write_text(folder / FACTS_NAME, json.dumps(named, indent=2), durable=True)
    except OSError as error:
        raise DataError(
            f"--reference-cache {folder} cannot be written: {error.strerror}; free some space, or"
            " name another directory"
        ) from error
    logger.info("kept the reference's log-probabilities of %d rows in %s", len(values), folder)


def _read(folder: Path, wanted: Facts) -> npt.NDArray[np.float32]:
    """Read values and check that they are what was written, of what is wanted."""
    path = folder / VALUES_NAME
    facts = _read_facts(folder, wanted)
    try:
        if file_sha256(path) != facts.get("sha256"):
            raise ValueError(f"its SHA-256 is not that in {FACTS_NAME}")
        values: npt.NDArray[np.float32] = np.load(path, allow_pickle=False)
        if values.ndim != 2 or values.shape[1] != _ROLES or values.dtype != np.float32:
            raise ValueError(f"has shape {values.shape} and type {values.dtype}")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}; remove {folder}") from error
    return values
