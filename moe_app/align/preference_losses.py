"""Computes the losses of DPO and KTO from log-probabilities of texts; pure functions of tensors."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PreferenceTerms:
    """Holds the losses of some items, and figures of their texts."""

    losses: Tensor
    """[m] of each pair or completion."""
    chosen_rewards: Tensor
    """[p] of the chosen or desirable texts: beta times the log-ratio to the reference."""
    rejected_rewards: Tensor
    """[q] of the rejected or undesirable texts."""


def dpo_terms(
    log_probs: Tensor, reference: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> PreferenceTerms:
    """Compute DPO's sigmoid loss.

    Source: Rafailov et al., "Direct Preference Optimization" (2023), equation 7; with label
    smoothing, Mitchell, "A note on DPO with noisy preferences" (2023), equation 3.

    Args:
        log_probs: [2m] of the policy; 2i is the chosen text of pair i, 2i + 1 the rejected one.
        reference: [2m] of the reference.
        beta: strength of the reference.
        label_smoothing: probability that a preference is the wrong way round, below 0.5.
    """
    rewards = beta * (log_probs - reference)
    chosen, rejected = rewards[0::2], rewards[1::2]
    margin = chosen - rejected
    losses = -F.logsigmoid(margin) * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
    return PreferenceTerms(losses=losses, chosen_rewards=chosen, rejected_rewards=rejected)


def kto_terms(
    log_probs: Tensor,
    reference: Tensor,
    is_desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PreferenceTerms:
    """Compute KTO's loss.

    Source: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization" (2024),
    equation 8.

    Args:
        log_probs: [m] of the policy.
        reference: [m] of the reference.
        is_desirable: [m] bool.
        kl: [] estimate of the divergence of policy and reference, not below 0; has no gradient.
        beta: strength of the reference.
        desirable_weight: of desirable texts (lambda_D).
        undesirable_weight: of the others (lambda_U).
    """
    ratios = log_probs - reference
    value = torch.where(is_desirable, ratios - kl, kl - ratios)
    weights = torch.where(is_desirable, desirable_weight, undesirable_weight).to(ratios.dtype)
    rewards = beta * ratios
    return PreferenceTerms(
        losses=weights * (1 - torch.sigmoid(beta * value)),
        chosen_rewards=rewards[is_desirable],
        rejected_rewards=rewards[~is_desirable],
    )
