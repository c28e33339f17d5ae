"""Defines what of a model trains, and at which rates; applies it to built chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron.trainer.config.near_names import did_you_mean
from megatron.trainer.errors import CheckpointError
from megatron.trainer.optim.groups import GroupRates
from moe_ext.config import MoEModelConfig
from moe_ext.layers.lora import LORA_PREFIX, TARGETS, LoRA, is_adapter
from moe_ext.parameter_groups import GROUPS, group_of, groups_of_model


@dataclass(frozen=True, kw_only=True)
class TrainableConfig:
    """Sets what trains, and the rates of groups of weights."""

    freeze: tuple[str, ...] = ()
    """Groups of weights that keep their values, after one another or joined by commas: embedding,
    attention, router, experts, shared_experts, mlp, norm, head. They have neither gradients nor
    optimizer state."""
    lr_multipliers: tuple[str, ...] = ()
    """GROUP=FACTOR for each group whose learning rate is not the run's."""
    weight_decay_multipliers: tuple[str, ...] = ()
    """GROUP=FACTOR for each group whose weight decay is not the run's."""
    lora_rank: int | None = None
    """Freeze every weight, and train products of this rank that are added to those of lora_targets;
    None trains the weights themselves."""
    lora_alpha: float | None = None
    """The products are multiplied by lora_alpha / lora_rank; None means twice the rank."""
    lora_targets: tuple[str, ...] = ("attention", "experts")
    """Groups of weights that get such products: attention, experts, router."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """Return the groups to freeze, in the order of `GROUPS`."""
        named = {name for text in self.freeze for name in text.split(",")}
        return tuple(group for group in GROUPS if group in named)

    @property
    def lora(self) -> LoRA | None:
        """Return what adapters the model has; None for none."""
        if self.lora_rank is None:
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        named = {name for text in self.lora_targets for name in text.split(",")}
        targets = tuple(name for name in TARGETS if name in named)
        return LoRA(rank=self.lora_rank, alpha=alpha, targets=targets)

    def problems(self, model: MoEModelConfig) -> list[str]:
        """Return what is wrong for this model, one message each."""
        there = groups_of_model(model)
        named = [name for text in self.freeze for name in text.split(",")]
        found = [
            f"freeze ({name!r}) {_unknown(name, model)}" for name in named if name not in there
        ]
        if not found and set(there) <= set(named):
            found.append(
                f"freeze names every group of the model ({', '.join(there)}), so nothing would"
                " train; leave out those that are to train"
            )
        for field in ("lr_multipliers", "weight_decay_multipliers"):
            found += self._multiplier_problems(field, model)
        return found + self._lora_problems(model)

    def _lora_problems(self, model: MoEModelConfig) -> list[str]:
        if self.lora_rank is None:
            if self.lora_alpha is None:
                return []
            return [f"lora_alpha ({self.lora_alpha:g}) needs lora_rank (None); set it too"]
        found = []
        if self.lora_rank < 1:
            found.append(f"lora_rank ({self.lora_rank}) must be at least 1; 8 to 64 is usual")
        if self.lora_alpha is not None and not 0.0 < self.lora_alpha < float("inf"):
            found.append(f"lora_alpha ({self.lora_alpha}) must be above 0; twice the rank is usual")
        if self.freeze:
            found.append(
                f"freeze ({', '.join(self.freeze)}) says nothing beside lora_rank"
                f" ({self.lora_rank}), which freezes every weight; drop one of the two"
            )
        there = [name for name in TARGETS if name in groups_of_model(model)]
        named = [name for text in self.lora_targets for name in text.split(",") if name]
        for name in named:
            if name not in there:
                found.append(
                    f"lora_targets ({name!r}) is nothing that this model can have adapters on"
                    f"{did_you_mean(name, there)}; use some of {', '.join(there)}"
                )
        if not named:
            found.append(f"lora_targets is empty; use some of {', '.join(there)}")
        return found

    def _multiplier_problems(self, field: str, model: MoEModelConfig) -> list[str]:
        there, found, seen = groups_of_model(model), [], set()
        for text in getattr(self, field):
            name, _, factor = text.partition("=")
            value = _as_number(factor)
            if value is None:
                found.append(
                    f"{field} has {text!r}; each is GROUP=FACTOR with a factor of at least 0, such"
                    " as router=0.1"
                )
            elif name not in there:
                found.append(f"{field} ({name!r}) {_unknown(name, model)}")
            elif name in seen:
                found.append(f"{field} names {name} twice; give one factor")
            elif name in self.frozen:
                found.append(
                    f"{field} has {text}, but freeze has {name}, which has no rate; leave out one"
                    " of the two"
                )
            elif value == 0.0 and field == "lr_multipliers":
                found.append(
                    f"{field} has {text}, which would train nothing but keep optimizer state; give"
                    f" --freeze {name} instead"
                )
            seen.add(name)
        return found

    def rates(self, model: MoEModelConfig) -> list[GroupRates]:
        """Return the groups with rates of their own."""
        rates, decays = (
            _factors(texts) for texts in (self.lr_multipliers, self.weight_decay_multipliers)
        )
        return [
            GroupRates(
                name=group,
                has=lambda name, group=group: group_of(name, model) == group,  # type: ignore[misc]
                lr=rates.get(group, 1.0),
                weight_decay=decays.get(group, 1.0),
            )
            for group in GROUPS
            if group in rates or group in decays
        ]

    def apply(self, chunks: Sequence[nn.Module], model: MoEModelConfig) -> None:
        """Freeze what is not to train, before DDP makes gradients for the rest.

        Args:
            chunks: this rank's, unwrapped; a stage may hold none of a group.
            model: the architecture.
        """
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if self.is_frozen(name, model):
                    parameter.requires_grad_(False)

    def is_frozen(self, name: str, model: MoEModelConfig) -> bool:
        """Return whether a weight keeps its values, by its name in its chunk or a checkpoint."""
        if self.lora_rank is not None:
            return not is_adapter(name)
        return group_of(name, model) in self.frozen

    def describe(self) -> list[str]:
        """Return lines for the head of the log."""
        lines = [f"frozen: {', '.join(self.frozen)}"] if self.frozen else []
        if (lora := self.lora) is not None:
            lines.append(
                f"frozen: every weight; LoRA of rank {lora.rank} times {lora.scale:g} on"
                f" {', '.join(lora.targets)} trains"
            )
        for field, what in (
            ("lr_multipliers", "learning rate"),
            ("weight_decay_multipliers", "weight decay"),
        ):
            factors = _factors(getattr(self, field))
            if factors:
                told = ", ".join(f"{group} x {factor:g}" for group, factor in factors.items())
                lines.append(f"{what}: {told}")
        return lines

    def check_saved(self, saved: Mapping[str, Any], is_continued: bool) -> tuple[str, ...]:
        """Refuse a checkpoint of other adapters, or with optimizer state of other weights.

        Args:
            saved: flat config of the run that wrote it.
            is_continued: whether more than the weights is taken.

        Returns:
            Parts of the names of weights that the checkpoint lacks: adapters that start here.

        Raises:
            CheckpointError: it does not fit.
        """
        before = saved_trainable(saved)
        if before.lora is not None and before.lora != self.lora:
            raise CheckpointError(
                f"the checkpoint holds {_told(before.lora)}, and this run has {_told(self.lora)};"
                " give the same --lora-rank, --lora-alpha and --lora-targets to go on with them, or"
                " export the checkpoint, which merges them into the weights, and import that"
            )
        if is_continued and before.lora != self.lora:
            raise CheckpointError(
                f"the checkpoint is of a run without adapters, and this one has {_told(self.lora)};"
                " start from its weights alone with --finetune"
            )
        if is_continued and before.frozen != self.frozen:
            raise CheckpointError(
                f"the run in the checkpoint froze {', '.join(before.frozen) or 'nothing'}, this one"
                f" {', '.join(self.frozen) or 'nothing'} (--freeze), and its optimizer state is of"
                " the weights that it trained; give the same groups, or start from its weights"
                " alone with --finetune"
            )
        return () if before.lora == self.lora else (f".{LORA_PREFIX}",)


def saved_trainable(saved: Mapping[str, Any]) -> TrainableConfig:
    """Return what trained in the run of a flat config; runs before these settings trained all."""
    fields = ("freeze", "lora_targets")
    return TrainableConfig(
        **{name: tuple(saved[name]) for name in fields if saved.get(name) is not None},
        lora_rank=saved.get("lora_rank"),
        lora_alpha=saved.get("lora_alpha"),
    )


def check_rates(saved: Mapping[str, Any], wanted: TrainableConfig) -> None:
    """Refuse to go on with other learning rates of groups.

    Args:
        saved: flat config of the run in the checkpoint.
        wanted: what trains now.

    Raises:
        CheckpointError: some group's differs.
    """
    before = {
        group: _as_number(factor) or 1.0
        for text in saved.get("lr_multipliers") or ()
        for group, _, factor in [str(text).partition("=")]
    }
    now = _factors(wanted.lr_multipliers)
    changed = [
        f"{group} had {was:g} x the learning rate and has {is_now:g}"
        for group in GROUPS
        if (was := before.get(group, 1.0)) != (is_now := now.get(group, 1.0))
    ]
    if changed:
        raise CheckpointError(
            f"the checkpoint's learning rates are others: {', '.join(changed)} (--lr-multipliers);"
            " give the same factors, or follow this run's from here on with --override-schedule"
        )


def _told(lora: LoRA | None) -> str:
    if lora is None:
        return "no adapters"
    return f"adapters of rank {lora.rank} and alpha {lora.alpha:g} on {', '.join(lora.targets)}"


def _unknown(name: str, model: MoEModelConfig) -> str:
    """Return the end of a message about a group that the model does not have."""
    there = groups_of_model(model)
    near = did_you_mean(name, there)
    why = ""
    if name in GROUPS:
        why = " here" if name != "head" else ", whose head is its embedding"
    return f"is no group of this model{why}{near}; it has {', '.join(there)}"


def _factors(texts: Sequence[str]) -> dict[str, float]:
    """Return factors by group; the texts have no problems."""
    return {name: float(factor) for name, _, factor in (text.partition("=") for text in texts)}


def _as_number(text: str) -> float | None:
    """Return a finite number of at least 0, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0.0 <= value < float("inf") else None
