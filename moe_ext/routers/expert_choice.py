"""Holds the routing rule by which experts choose tokens."""

from typing import NoReturn

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from moe_ext.functional import balance_of, router_z_loss, statistics_dtype
from moe_ext.routers.base import MoERouter
from moe_ext.unequal import DenseRouting, choose_tokens


class ExpertChoiceRouter(MoERouter):
    """Lets each expert take the k s / e tokens of each sequence that score highest with it.

    Scores are softmax over the experts, and gates are the scores. A token has 0 to e experts. Which
    ones depends on all tokens of its sequence: text cannot be generated token by token, and losses
    are of a model that sees ahead a little.

    Source: Zhou et al., expert choice routing (arXiv 2202.09368), section 3.2.
    """

    is_causal = False
    is_grouped = False
    """Whether the tokens of all sequences of the micro-batch compete, not those of each."""

    def select(self, logits: Tensor) -> NoReturn:
        """Refuses: what a token gets is no matter of its own logits."""
        raise NotImplementedError("experts choose tokens; there is no selection for each token")

    def route(self, logits: Tensor, is_token: Tensor | None, *, num_sequences: int) -> DenseRouting:
        """Lets the experts choose among the tokens of all ranks that share the micro-batch."""
        scores = logits.softmax(dim=-1, dtype=statistics_dtype(logits))  # [t, e]
        marked = scores.detach()
        if is_token is not None:
            marked = marked.masked_fill(~is_token[:, None], -1.0)
        whole = self.token_split.gather(marked.view(-1, num_sequences, self.num_experts))
        rivals = whole.flatten(0, 1)[:, None] if self.is_grouped else whole
        chosen = choose_tokens(rivals, topk=self.topk).view_as(whole)  # [S, b, e]
        is_chosen = self.token_split.own(chosen).flatten(0, 1)  # [t, e]
        routing = DenseRouting(gates=scores.masked_fill(~is_chosen, 0.0), is_chosen=is_chosen)
        if not (self.training and torch.is_grad_enabled()):
            return routing
        if is_token is not None:
            scores = scores.masked_fill(~is_token[:, None], 0.0)
        number = logits.shape[0] * self.token_group.size() if is_token is None else None
        z_loss = self._measure(
            routing.is_chosen,
            scores,
            logits,
            is_token,
            counts=chosen.flatten(0, 1).sum(dim=0),
            num_tokens=(whole[..., 0] >= 0).sum().clamp(min=1) if number is None else number,
        )
        gates = MoEAuxLossAutoScaler.apply(routing.gates, self.z_loss_coeff * z_loss)
        return routing._replace(gates=gates)

    def _measure(
        self,
        is_chosen: Tensor,
        scores: Tensor,
        logits: Tensor,
        is_token: Tensor | None,
        *,
        counts: Tensor,
        num_tokens: int | Tensor,
    ) -> Tensor:
        """Records the micro-batch, and returns the z-loss [].

        Args:
            is_chosen: [t, e].
            scores: [t, e]; 0 for padding.
            logits: [t, e].
            is_token: [t] bool, False for padding; None for none.
            counts: [e] tokens of each expert in the micro-batch.
            num_tokens: T.
        """
        z_loss = router_z_loss(logits, num_tokens=num_tokens, is_token=is_token)
        shares = counts.to(scores.dtype) / counts.sum().clamp(min=1)  # [e]
        unrouted = ~is_chosen.any(dim=1)  # [t]
        self._record(
            balance=balance_of(scores.detach(), shares, num_tokens=num_tokens),
            z_loss=z_loss,
            scores=scores,
            tokens_per_expert=is_chosen.sum(dim=0),
            num_local=logits.shape[0] if is_token is None else is_token.sum(),
            num_tokens=num_tokens,
            unrouted=(unrouted if is_token is None else unrouted & is_token).sum(),
        )
        return z_loss


class GroupedExpertChoiceRouter(ExpertChoiceRouter):
    """Lets each expert take the k T / e tokens of the micro-batch that score highest with it."""

    is_grouped = True
