"""Defines the settings of an alignment run."""

from dataclasses import dataclass, field
from typing import Literal

from moe_app.chat.dialogue import ChatKind
from moe_app.finetune.tuning_config import TuningConfig


@dataclass(frozen=True, kw_only=True)
class AlignSettings:
    """Sets the objective of alignment, and its reference."""

    method: Literal["dpo", "kto"] = "dpo"
    """dpo learns from pairs of answers, kto from single ones that were judged."""
    beta: float = 0.1
    """How strongly the reference holds the model."""
    label_smoothing: float = 0.0
    """DPO: probability that a preference is the wrong way round."""
    average_log_prob: bool = False
    """Take the mean over an answer's tokens as its log-probability, not the sum."""
    desirable_weight: float = 1.0
    """KTO: weight of the losses of desirable answers."""
    undesirable_weight: float = 1.0
    """KTO: weight of the losses of the others."""
    reference_load: str | None = None
    """Run directory of the reference; None means --load's."""
    reference_ckpt_step: int | None = None
    """Iteration of the reference; None takes the newest, or --load's --ckpt-step."""
    reference_cache: str | None = None
    """Compute the reference's log-probabilities once and keep them in this directory; None keeps a
    second model in memory, and asks it every step."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig(TuningConfig):
    """Holds the settings of an alignment run."""

    align: AlignSettings = field(default_factory=AlignSettings)
    """The objective."""

    @property
    def kind(self) -> ChatKind:
        """Return the kind of rows that the method learns from."""
        return "preference" if self.align.method == "dpo" else "kto"

    def own_problems(self) -> list[str]:
        """Return what is wrong with the settings of this stage, one message each."""
        found, align = super().own_problems(), self.align
        if align.beta <= 0:
            found.append(f"beta ({align.beta:g}) must be above 0; use 0.1, for example")
        if not 0 <= align.label_smoothing < 0.5:
            found.append(
                f"label_smoothing ({align.label_smoothing:g}) must be at least 0 and below 0.5;"
                " from there on the worse answer is the better one; use 0"
            )
        for name in ("desirable_weight", "undesirable_weight"):
            value = getattr(align, name)
            if value < 0:
                found.append(f"{name} ({value:g}) must be at least 0; use 1")
        if align.method == "kto" and align.label_smoothing:
            found.append("label_smoothing is DPO's; drop it, or use --method dpo")
        if self.checkpoint.anneal_from is not None:
            found.append("anneal_from branches pretraining runs; alignment begins with --load")
        return found
