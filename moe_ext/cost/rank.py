"""Describe one rank of a training step: its batch, its share of the layout, and its sizes."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from moe_ext.config import MoEModelConfig
from moe_ext.cost.collective import Collective, Group, Kind, Purpose, make_collective
from moe_ext.cost.param_shards import Chunk, Layout, model_chunks


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Describes a step: its batch, and the settings that its collectives depend on."""

    seq_length: int
    """Tokens per sequence (s of the whole sequence)."""
    micro_batch_size: int
    """Sequences in a micro-batch (b)."""
    num_microbatches: int
    """Forward passes of a data parallel rank."""
    bf16: bool = True
    """Parameters and activations in bfloat16; gradients are fp32 either way."""
    use_distributed_optimizer: bool = False
    """Whether optimizer state is sharded."""
    overlap_grad_reduce: bool = False
    """Whether gradients are reduced bucket by bucket."""
    overlap_param_gather: bool = False
    """Whether updated weights are gathered in those buckets, under the next forward pass."""
    recompute: Literal["full", "moe"] | None = None
    """What backward recomputes: every layer, or the layers of experts."""
    imbalance: float = 1.0
    """Assignments of the busiest expert parallel rank over those of the average rank; dispatch and
    combine bytes are those of the busiest. 1 is balanced routing."""
    device_type: Literal["cpu", "cuda"] = "cuda"
    """Decides in how many chunks the head computes its logits."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Describes a rank of a run and computes the sizes its collectives depend on."""

    model: MoEModelConfig
    layout: Layout
    batch: Batch
    stage: int

    @cached_property
    def chunks(self) -> list[Chunk]:
        """Return the rank's model chunks."""
        return model_chunks(self.model, self.layout, self.stage)

    @property
    def is_split(self) -> bool:
        """Return whether activations between the matrices are split along the sequence."""
        return self.layout.sequence_parallel and self.layout.tensor > 1

    @property
    def num_layers(self) -> int:
        """Return the layers on this rank."""
        return self.model.num_layers // self.layout.pipeline

    @property
    def layer_runs(self) -> int:
        """Return layers times micro-batches."""
        return self.num_layers * self.batch.num_microbatches

    @property
    def width(self) -> int:
        """Return the bytes per element of a parameter or activation."""
        return 2 if self.batch.bf16 else 4

    @property
    def tokens(self) -> int:
        """Return the tokens per micro-batch inside the attention matrices."""
        return self.batch.seq_length // self.layout.context * self.batch.micro_batch_size

    @property
    def own_tokens(self) -> int:
        """Return the tokens per micro-batch between the matrices: those that this rank routes."""
        return self.tokens // (self.layout.tensor if self.is_split else 1)

    @property
    def hidden_bytes(self) -> int:
        """Return the bytes of the hidden states [tokens, h]."""
        return self.tokens * self.model.hidden_size * self.width

    @property
    def received_rows(self) -> float:
        """Return the rows that this rank's experts compute per micro-batch, on the busiest rank."""
        rows = self.own_tokens * self.model.moe_router_topk * self.layout.expert_tensor
        return rows * (self.batch.imbalance if self.layout.expert > 1 else 1.0)

    def forward_passes(self, part: Literal["attention", "experts"]) -> int:
        """Return how often a part of a layer is computed: twice if backward recomputes it."""
        again = ("full", "moe") if part == "experts" else ("full",)
        return 2 if self.batch.recompute in again else 1

    def call(
        self, kind: Kind, group: Group, count: int, size: float, purpose: Purpose
    ) -> Collective:
        """Build a collective of `count` calls per step of `size` bytes each."""
        return make_collective(self.layout, kind, group, count, size, purpose)
