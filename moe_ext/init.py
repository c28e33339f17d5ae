"""Draws initial weights from the seed and the parameter's name, whatever the layout."""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from moe_ext.layers.lora import is_adapter

Fill = Callable[[Tensor, torch.Generator], None]
"""Draws a matrix in place."""

_BLOCK = 2**15 - 16
"""How many numbers are drawn at a time: caches hold them, and torch starts no threads for them."""
_REJECTION_FROM = 0.386
"""Standard deviations from which on `trunc_normal_` redraws; a narrower interval (0.3 of a normal
distribution or less) is drawn evenly and thinned out."""
_UNIT = 16
"""torch draws normal numbers by so many; a tensor of fewer takes another way."""


def initialize_weights(
    chunks: list[nn.Module], *, seed: int, std: float, cutoff: float | None
) -> None:
    """Draws every matrix of the model from a normal distribution, in place.

    Each matrix has a random stream of its own, seeded by the run's seed, its global name and its
    layer and expert number; a rank draws the whole matrix on the CPU and keeps its shard. Any
    layout therefore starts from the same bits. As many matrices are drawn at a time as torch has
    threads, which a launcher sets to the cores that a rank may use. Norm weights keep their ones.
    There is no depth scaling (OLMoE, table 10 and appendix B).

    Args:
        chunks: this rank's model chunks, unwrapped (megatron-core modules).
        seed: the run's seed.
        std: standard deviation before truncation.
        cutoff: values beyond this many standard deviations are redrawn; None keeps all.
    """

    def normal(full: Tensor, generator: torch.Generator) -> None:
        if cutoff is None:
            full.normal_(std=std, generator=generator)
        else:
            draw_truncated_(full, std=std, bound=cutoff * std, generator=generator)

    shards = (shard for shard in weight_shards(chunks) if not is_adapter(shard.key))
    _draw_all(_draws(shards, seed=seed), normal)


def initialize_adapters(chunks: list[nn.Module], *, seed: int) -> None:
    """Draws every A of an adapter evenly from +-1 / sqrt(in), in place; every B is zero.

    The model then computes what it does without adapters. Each matrix has a stream of its own, as
    in `initialize_weights`.

    Args:
        chunks: this rank's model chunks, unwrapped.
        seed: the run's seed.
    """

    def uniform(full: Tensor, generator: torch.Generator) -> None:
        bound = full.shape[-1] ** -0.5
        nn.init.uniform_(full, -bound, bound, generator=generator)

    adapters = [shard for shard in weight_shards(chunks) if is_adapter(shard.key)]
    drawn = (shard for shard in adapters if shard.key.endswith(".a"))
    _draw_all(_draws(drawn, seed=seed), uniform)
    for shard in adapters:
        if not shard.key.endswith(".a") and shard.data is not None:
            nn.init.zeros_(shard.data.detach())


def random_stream(name: str) -> torch.Generator:
    """Returns the generator that a name alone seeds."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def weight_shards(chunks: list[nn.Module]) -> Iterator[ShardedTensor]:
    """Yields this rank's parts of the global tensors."""
    for chunk in chunks:
        for value in nested_values(chunk.sharded_state_dict()):  # type: ignore[operator]
            parts = value.build() if isinstance(value, ShardedTensorFactory) else value
            for part in nested_values({"part": parts}):
                if isinstance(part, ShardedTensor):
                    yield part


def draw_truncated_(full: Tensor, *, std: float, bound: float, generator: torch.Generator) -> None:
    """Draws from N(0, std) in place and redraws what lies beyond +-bound, as `trunc_normal_` does.

    The bits are those of torch 2.13's `trunc_normal_`, whose every round draws the whole matrix
    anew and takes the values that are still missing. Here a round is drawn a block at a time into
    memory that caches hold, and looked at where values are missing, not everywhere.

    Args:
        full: [...] fp32 on the CPU, contiguous.
        std: standard deviation before truncation.
        bound: largest magnitude kept.
        generator: the stream.
    """
    flat = full.view(-1)
    if bound < _REJECTION_FROM * std or len(flat) < _UNIT:
        nn.init.trunc_normal_(full, std=std, a=-bound, b=bound, generator=generator)
        return
    # A remainder of less than a unit belongs to the block before it.
    ends = [*range(_BLOCK, len(flat) - _UNIT + 1, _BLOCK), len(flat)]
    blocks = [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    limit = torch.tensor(bound, dtype=full.dtype)
    missing = {}
    for index, block in enumerate(blocks):
        block.normal_(std=std, generator=generator)
        places = (block.abs() > limit).nonzero().squeeze(1)
        if len(places):
            missing[index] = places
    scratch = flat.new_empty(_BLOCK + _UNIT)
    while missing:
        for index, block in enumerate(blocks):
            redrawn = scratch[: len(block)].normal_(std=std, generator=generator)
            if index not in missing:
                continue
            places = missing.pop(index)
            block[places] = redrawn[places]
            places = places[redrawn[places].abs() > limit]
            if len(places):
                missing[index] = places


@dataclass
class _Draw:
    """Describes one matrix and where this rank keeps parts of it."""

    shape: tuple[int, ...]
    """Of the whole matrix."""
    parts: list[tuple[Tensor, tuple[int, ...]]] = field(default_factory=list)
    """A tensor of this rank, and the place of its first element in the matrix."""

    def keep(self, full: Tensor) -> None:
        """Copies the parts from the whole matrix."""
        with torch.no_grad():
            for local, offset in self.parts:
                window = [slice(o, o + n) for o, n in zip(offset, local.shape, strict=True)]
                local.copy_(full[tuple(window)])


def _draws(shards: Iterator[ShardedTensor], *, seed: int) -> dict[str, _Draw]:
    """Returns what is to be drawn by the name of its stream, each once.

    The leading `prepend_axis_num` axes of the global shape number layers; stacks of three and more
    dimensions number experts on their first axis.
    """
    found: dict[str, _Draw] = {}
    for shard in shards:
        prepended = shard.prepend_axis_num
        shape = shard.global_shape[prepended:]
        offset = shard.global_offset[prepended:]
        if len(shape) < 2 or shard.data is None or shard.data.is_meta:
            continue
        data = shard.data.detach()
        name = f"{seed}:{shard.key}{list(shard.global_offset[:prepended])}"
        if len(shape) == 2:
            found.setdefault(name, _Draw(shape)).parts.append((data, offset))
            continue
        for index, matrix in enumerate(data):
            stream = f"{name}[{offset[0] + index}]"
            found.setdefault(stream, _Draw(shape[1:])).parts.append((matrix, offset[1:]))
    return found


def _draw_all(draws: dict[str, _Draw], fill: Fill) -> None:
    """Draws each matrix from the stream of its name, several at a time; keeps this rank's parts.

    torch draws one matrix on one core, and lets other threads run meanwhile. An error of a thread
    is raised here.
    """

    def draw(stream: str) -> Tensor:
        full = torch.empty(draws[stream].shape, dtype=torch.float32)
        fill(full, random_stream(stream))
        return full

    num_threads = torch.get_num_threads()
    if num_threads == 1:
        for stream, each in draws.items():
            each.keep(draw(stream))
        return
    # The largest first, so that none is left for one core at the end.
    order = sorted(draws, key=lambda stream: -math.prod(draws[stream].shape))
    running: dict[Future[Tensor], _Draw] = {}
    with ThreadPoolExecutor(num_threads) as pool:
        for stream in order:
            if len(running) == num_threads:
                _keep_finished(running)
            running[pool.submit(draw, stream)] = draws[stream]
        while running:
            _keep_finished(running)


def _keep_finished(running: dict[Future[Tensor], _Draw]) -> None:
    """Waits until a matrix is drawn, and keeps the parts of all that are."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        running.pop(future).keep(future.result())
