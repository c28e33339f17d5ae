"""Makes the weights of a mixture of experts from those of a dense model (sparse upcycling).

Komatsuzaki et al., arXiv 2212.05055; OLMoE, section 4.1.5; granular splits and groups of routers:
He et al., arXiv 2410.07524; partly new experts: Nakamura et al., arXiv 2502.19261. Nothing here
reads or writes files. Letters are those of docs/glossary.md.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_ext.config import MoEModelConfig
from moe_ext.init import random_stream

NOISE_STD = 0.02
"""Of the values that `Upcycling.noise` puts in."""


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """Says how experts come from dense feed-forward layers.

    With the defaults every expert is a copy, and the router is new, as OLMoE does it.
    """

    num_experts: int
    """Experts per layer (e)."""
    topk: int
    """Experts per token (k)."""
    granularity: int = 1
    """Parts of a dense feed-forward layer (G), each the width of an expert. The parts of a copy
    have the same row in the router, so that tokens choose copies, whole, while they do."""
    noise: float = 0.0
    """Share of each expert's values that are drawn anew, N(0, 0.02)."""
    drop: float = 0.0
    """Share of each expert's width whose values are drawn anew, with the mean and the standard
    deviation of those they replace, of each matrix its own."""
    shared: bool = False
    """Keep the dense layer beside its copies, as an expert that every token has."""
    preserve_function: bool = False
    """Divide the gates by their sum, and make up for a split in parts and for a shared expert.
    Without noise and drop the model then computes what the dense one does."""
    layer_freq: int = 1
    """Every how many layers one is upcycled, the last of so many; the others stay dense."""
    seed: int = 1234
    """Of router, noise and drop."""

    def problems(self, dense: MoEModelConfig) -> list[str]:
        """Return what prevents a model from being upcycled so, one message each."""
        found = []
        if dense.num_experts is not None:
            found.append(
                f"the model has num_experts {dense.num_experts}; only a dense one, with num_experts"
                " None, can be upcycled; load a dense model"
            )
        for name, value in (("num_experts", self.num_experts), ("topk", self.topk)):
            if value < 1 or value % self.granularity:
                found.append(
                    f"{name} ({value}) must be a positive multiple of the granularity"
                    f" ({self.granularity}), so that whole copies can be made and chosen; change"
                    " one of them"
                )
        if self.layer_freq > dense.num_layers:
            found.append(
                f"moe_layer_freq ({self.layer_freq}) must be at most num_layers"
                f" ({dense.num_layers}), or no layer has experts; lower it"
            )
        if self.topk > self.num_experts:
            found.append(
                f"topk ({self.topk}) must be at most num_experts ({self.num_experts}); lower it"
            )
        width = dense.ffn_hidden_size
        if width is not None and width % self.granularity:
            found.append(
                f"ffn_hidden_size ({width}) must be a multiple of the granularity"
                f" ({self.granularity}); use one of its divisors"
            )
        return found

    def model(self, dense: MoEModelConfig) -> MoEModelConfig:
        """Return the architecture that a dense model becomes.

        Raises:
            ValueError: it cannot.
        """
        problems = self.problems(dense)
        if problems:
            raise ValueError("; ".join(problems))
        return replace(
            dense,
            num_experts=self.num_experts,
            moe_router_topk=self.topk,
            moe_ffn_hidden_size=(dense.ffn_hidden_size or 0) // self.granularity,
            moe_shared_expert_intermediate_size=dense.ffn_hidden_size if self.shared else None,
            moe_layer_freq=self.layer_freq,
            ffn_hidden_size=dense.ffn_hidden_size if self.layer_freq > 1 else None,
            router="topk_softmax" if self.preserve_function else "softmax_topk",
        )

    def makes_experts(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, is upcycled."""
        return (layer + 1) % self.layer_freq == 0

    def router(self, layer: int, hidden_size: int, std: float) -> Tensor:
        """Draw a layer's router [e, h], fp32, from N(0, std)."""
        copies = torch.empty(self.num_experts // self.granularity, hidden_size)
        stream = random_stream(f"{self.seed}:router[{layer}]")
        return copies.normal_(std=std, generator=stream).repeat_interleave(self.granularity, 0)

    def expert(self, layer: int, expert: int, fc1: Tensor, fc2: Tensor) -> tuple[Tensor, Tensor]:
        """Make an expert from a layer's dense matrices.

        Args:
            layer: counted from 0.
            expert: counted from 0; expert i holds part i mod G of a copy.
            fc1: [2 f G, h], gate then up.
            fc2: [h, f G].

        Returns:
            Gate and up [2, f, h], and down [h, f]; fp32.
        """
        part = expert % self.granularity
        width = fc2.shape[1] // self.granularity
        own = slice(part * width, (part + 1) * width)
        into = fc1.float().unflatten(0, (2, -1))[:, own].clone()
        out = fc2.float()[:, own].clone()
        if self.preserve_function:
            out *= self.granularity * self._share()
        stream = random_stream(f"{self.seed}:experts[{layer}][{expert}]")
        if self.drop:
            chosen = torch.randperm(width, generator=stream)[: round(self.drop * width)]
            for matrix, axis in ((into[0], 0), (into[1], 0), (out, 1)):
                _redraw(matrix, axis, chosen, stream)
        if self.noise:
            for matrix in (into, out):
                is_new = torch.rand(matrix.shape, generator=stream) < self.noise
                drawn = torch.empty_like(matrix).normal_(std=NOISE_STD, generator=stream)
                matrix.copy_(torch.where(is_new, drawn, matrix))
        return into, out

    def shared_expert(self, fc1: Tensor, fc2: Tensor) -> tuple[Tensor, Tensor]:
        """Make the expert that every token has from a layer's dense matrices, in their shapes."""
        return fc1.float(), fc2.float() * (self._share() if self.preserve_function else 1.0)

    def _share(self) -> float:
        """Return what copies are multiplied by so that a shared expert doubles nothing."""
        return 0.5 if self.shared else 1.0

    def gate_sum(self, logits: Tensor) -> Tensor:
        """Return what copies of a dense layer multiply its output by, of router logits [..., e]."""
        if self.preserve_function:
            return torch.ones_like(logits[..., 0])
        chosen = logits.float().softmax(-1).topk(self.topk).values
        return chosen.sum(-1) / self.granularity + float(self.shared)


def _redraw(matrix: Tensor, axis: int, chosen: Tensor, stream: torch.Generator) -> None:
    """Draw the chosen rows (axis 0) or columns anew, with their mean and standard deviation."""
    if not len(chosen):
        return
    before = matrix.index_select(axis, chosen)
    drawn = torch.empty_like(before).normal_(generator=stream)
    matrix.index_copy_(axis, chosen, drawn * before.std(correction=0) + before.mean())
