"""Align a model with preferences; start it with torchrun, or alone on one device."""

import logging
from collections.abc import Sequence
from typing import Any

from megatron.trainer.objective import Objective
from megatron.trainer.runtime.collective import on_rank0
from megatron.trainer.runtime.launch import RunContext, run_main
from megatron.trainer.runtime.upstream_warnings import hide_upstream_warnings
from megatron.trainer.state import TrainState
from moe_app.align.align_config import AlignConfig
from moe_app.align.preference import DPOObjective, KTOObjective, References
from moe_app.align.reference import (
    LiveReference,
    find_reference,
    identity_of,
    keep_reference,
    load_reference,
)
from moe_app.command_line import program
from moe_app.finetune.finetuning import open_texts
from moe_app.finetune.tuning_config import length_known, parse_tuning
from moe_app.pretrain.build import OpenedData, build_state
from moe_app.pretrain.command import run_stage

logger = logging.getLogger("align")


@hide_upstream_warnings()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe and flags in `argv`; returns the exit status."""
    return run_main(
        lambda: run_stage(
            parse_tuning(AlignConfig, argv, prog=program("align"), description=__doc__ or ""),
            Alignment(),
        )
    )


class Alignment:
    """Learns from preferences, held by a reference."""

    def __init__(self) -> None:
        self._data: OpenedData | None = None

    def open(self, cfg: AlignConfig, ctx: RunContext) -> AlignConfig:
        """Tokenize the texts, or read them from the cache; resolve the epochs."""
        self._data, num_samples = open_texts(cfg, ctx, cfg.kind)
        return length_known(cfg, num_samples, ctx)

    def build(self, cfg: AlignConfig, ctx: RunContext) -> tuple[TrainState, Objective]:
        """Return the state at iteration 0, and the objective; a collective call."""
        state = build_state(cfg, ctx, self._data)
        references, words = self._references(cfg, state)
        align = cfg.align
        logger.info(
            "objective: %s, beta %g, %s of log-probabilities; reference: %s",
            *(align.method.upper(), align.beta, "mean" if align.average_log_prob else "sum", words),
        )
        if align.method == "dpo":
            return state, DPOObjective(
                references,
                beta=align.beta,
                label_smoothing=align.label_smoothing,
                is_average=align.average_log_prob,
            )
        return state, KTOObjective(
            references,
            beta=align.beta,
            desirable_weight=align.desirable_weight,
            undesirable_weight=align.undesirable_weight,
            is_average=align.average_log_prob,
        )

    def _references(self, cfg: AlignConfig, state: TrainState) -> tuple[References, str]:
        """Return what gives the reference's log-probabilities, and what it is."""
        found = find_reference(cfg)
        state.fixed = {"reference": on_rank0("reading the reference", lambda: identity_of(found))}
        if cfg.align.reference_cache is None:
            chunks = load_reference(cfg, state, found)
            live = LiveReference(chunks=chunks, is_average=cfg.align.average_log_prob)
            return live, f"{found.path}, in memory"
        assert self._data is not None  # `open` is called first
        sources: dict[str, Any] = {each.name: each for each in self._data.bundle.sources().values()}
        return keep_reference(cfg, state, found, sources), f"{found.path}, kept on disk"
