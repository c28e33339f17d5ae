"""Compute what trl's trainers make of a few texts: losses, figures and every gradient.

trl is built as its users build it, without its router loss, and asked about one batch. What it
leaves out (label smoothing, means over tokens) is written out here from the formulas.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from tests.distributed.hf_models import random_model
from tests.distributed.preference_texts import LABELS, VOCAB, Text, mismatched, pairs

BETA = 0.1
WEIGHTS = (1.25, 0.8)


@dataclass(frozen=True)
class Truth:
    """What one step should report, and every gradient by transformers' names."""

    metrics: dict[str, Any]
    gradients: dict[str, Tensor]


class TextsAsTheyAre:
    """Leaves a dataset that has token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


class Dpo(TextsAsTheyAre, DPOTrainer):
    """trl's trainer on token ids."""


class Kto(TextsAsTheyAre, KTOTrainer):
    """trl's trainer on token ids."""


class Sft(TextsAsTheyAre, SFTTrainer):
    """trl's trainer on token ids."""


@dataclass
class Trainers:
    """trl's trainers of a family, all of the same two models."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    dpo: Dpo
    kto: Kto
    sft: Sft


def trainers_of(family: str, out: Path) -> Trainers:
    """Build trl's trainers of a family's random policy and reference."""
    words = {f"t{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")),
        eos_token="t1",
        pad_token="t0",
    )
    shared: dict[str, Any] = {
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "router_aux_loss_coef": 0.0,
        "per_device_train_batch_size": len(LABELS),
        "activation_checkpointing": False,
    }
    given: dict[str, Any] = {"processing_class": tokenizer}

    def policy() -> PreTrainedModel:
        return random_model(family)  # trl changes the model's forward pass

    def reference() -> PreTrainedModel:
        return random_model(family, seed=1)

    return Trainers(
        policy=policy(),
        reference=reference(),
        dpo=Dpo(
            **given,
            model=policy(),
            ref_model=reference(),
            args=DPOConfig(**shared, beta=BETA),
            train_dataset=Dataset.from_list(_pairs()),
        ),
        kto=Kto(
            **given,
            model=policy(),
            ref_model=reference(),
            args=KTOConfig(
                **shared, beta=BETA, desirable_weight=WEIGHTS[0], undesirable_weight=WEIGHTS[1]
            ),
            train_dataset=Dataset.from_list(_judged()),
        ),
        sft=Sft(
            **given,
            model=policy(),
            args=SFTConfig(**shared),
            train_dataset=Dataset.from_list(_texts()),
        ),
    )


def truths_of(trainers: Trainers) -> dict[str, Truth]:
    """Return what each objective should give, by the name of the objective."""
    dpo = _taken(trainers.dpo, _pairs(), "dpo_loss")
    kto = _taken(trainers.kto, _judged(), "kto_loss")
    kto.metrics["kl"] = trainers.kto._metrics["eval"]["kl"][-1]
    assert kto.metrics["kl"] > 0
    mean = _tuned(trainers, [_texts()])
    trained = _trained(trainers.kto, _judged(), steps=3)
    counted = sum(len(answer) for (_, answer), _ in pairs())
    return {
        "dpo": dpo,
        "dpo smooth": _formula(trainers, label_smoothing=0.2, is_average=False),
        "dpo average": _formula(trainers, label_smoothing=0.0, is_average=True),
        "kto": kto,
        "kto rmsprop": trained,
        "token-mean": mean,
        "sum": Truth(mean.metrics, {name: each * counted for name, each in mean.gradients.items()}),
        "sample-mean": Truth(
            mean.metrics, _tuned(trainers, [[each] for each in _texts()]).gradients
        ),
    }


def _taken(trainer: Any, rows: list[dict[str, Any]], loss_name: str) -> Truth:
    """Ask trl about one batch."""
    trainer._metrics["eval"].clear()
    with _gradients(trainer.model) as gradients:
        loss = trainer._compute_loss(trainer.model, trainer.data_collator(rows), False)
        loss.backward()
    names = {
        "rewards_chosen": "rewards/chosen",
        "rewards_rejected": "rewards/rejected",
        "rewards_margin": "rewards/margins",
        "logps_chosen": "logps/chosen",
        "logps_rejected": "logps/rejected",
    }
    found = trainer._metrics["eval"]
    metrics = {loss_name: loss.item(), **{ours: found[its][0] for ours, its in names.items()}}
    if "rewards/accuracies" in found:
        metrics["rewards_accuracy"] = found["rewards/accuracies"][0]
    return Truth(metrics, gradients)


def _trained(trainer: Any, rows: list[dict[str, Any]], *, steps: int) -> Truth:
    """Train on one batch by torch's RMSprop; the weights are as before afterwards."""
    model = trainer.model
    before = {name: each.clone() for name, each in model.state_dict().items()}
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.99, eps=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = trainer._compute_loss(model, trainer.data_collator(rows), False)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.load_state_dict(before)
    return Truth({"losses": losses}, {})


def losses_with_adapters(
    trainers: Trainers, settings: dict[str, Any], tensors: dict[str, Tensor], *, steps: int
) -> list[float]:
    """Train adapters on one batch of pairs by AdamW; the trainer's model has them afterwards.

    Args:
        trainers: of the family.
        settings: of the adapters, as in adapter_config.json.
        tensors: what they begin with, by peft's names.
        steps: to take.
    """
    trainer: Any = trainers.dpo
    config = LoraConfig(**{**settings, "inference_mode": False})
    model: Any = get_peft_model(trainer.model, config)
    loaded: Any = set_peft_model_state_dict(model, tensors)
    assert not loaded.unexpected_keys
    weights = [each for each in model.parameters() if each.requires_grad]
    assert sum(each.numel() for each in weights) == sum(each.numel() for each in tensors.values())
    optimizer = torch.optim.AdamW(weights, lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = trainer._compute_loss(model, trainer.data_collator(_pairs()), False)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _tuned(trainers: Trainers, batches: list[list[dict[str, Any]]]) -> Truth:
    """Ask trl about batches; the loss is the mean of theirs."""
    losses = []
    model: Any = trainers.sft.model
    with _gradients(model) as gradients:
        for rows in batches:
            inputs = trainers.sft.data_collator(rows)
            loss = trainers.sft.compute_loss(model, inputs)
            (loss / len(batches)).backward()
            losses.append(loss.item())
    return Truth({"lm_loss": sum(losses) / len(losses)}, gradients)


def _formula(trainers: Trainers, *, label_smoothing: float, is_average: bool) -> Truth:
    """Compute DPO's loss as it is written: of one text after the other, from logits."""
    texts = [text for pair in pairs() for text in pair]
    with _gradients(trainers.policy) as gradients:
        policy = torch.stack([_log_prob(trainers.policy, each, is_average) for each in texts])
        with torch.no_grad():
            reference = torch.stack(
                [_log_prob(trainers.reference, each, is_average) for each in texts]
            )
        rewards = BETA * (policy - reference)
        margin = rewards[0::2] - rewards[1::2]
        right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
        loss = -((1 - label_smoothing) * right + label_smoothing * wrong).mean()
        loss.backward()
    return Truth(
        {
            "dpo_loss": loss.item(),
            "rewards_chosen": rewards[0::2].mean().item(),
            "rewards_rejected": rewards[1::2].mean().item(),
            "rewards_margin": margin.mean().item(),
            "rewards_accuracy": (margin > 0).float().mean().item(),
            "logps_chosen": policy[0::2].mean().item(),
            "logps_rejected": policy[1::2].mean().item(),
        },
        gradients,
    )


def _log_prob(model: PreTrainedModel, text: Text, is_average: bool) -> Tensor:
    prompt, answer = text
    ids = torch.tensor([prompt + answer])
    log_probs = model(ids, use_cache=False).logits[0].log_softmax(-1)
    own = log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
    return own.mean() if is_average else own.sum()


@contextmanager
def _gradients(model: Any) -> Iterator[dict[str, Tensor]]:
    """Yield what will hold the gradients of the backward passes within."""
    model.zero_grad(set_to_none=True)
    found: dict[str, Tensor] = {}
    yield found
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name] = torch.zeros_like(parameter) if gradient is None else gradient.clone()


def _pairs() -> list[dict[str, Any]]:
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for (prompt, chosen), (_, rejected) in pairs()
    ]


def _judged() -> list[dict[str, Any]]:
    rows = zip(pairs(), mismatched(), LABELS, strict=True)
    return [
        {"prompt_ids": prompt, "completion_ids": own, "KL_completion_ids": other, "label": label}
        for ((prompt, own), _), (_, other), label in rows
    ]


def _texts() -> list[dict[str, Any]]:
    return [
        {
            "input_ids": prompt + answer,
            "labels": [-100] * len(prompt) + answer,
        }
        for (prompt, answer), _ in pairs()
    ]
