"""Converts optimizer state to a form independent of layout and optimizer class.

megatron-core's optimizers each have a checkpoint form of their own. Here a checkpoint holds, for
each parameter by its global name, `exp_avg`, `exp_avg_sq` and (bf16) the fp32 master weight; the
rest (parameter groups, hyper-parameters) belongs to the run and is rebuilt. So a checkpoint moves
freely between TP, PP, EP, ETP and DP sizes, and between the plain and the distributed optimizer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

_METADATA = {
    # Model-shaped tensors by parameter name instead of flat buffers by data parallel rank.
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    # Dense and expert optimizers share one name space: their parameters differ in name anyway.
    "chained_optim_avoid_prefix": True,
}
OPTIMIZER_PREFIX = "optimizer.state."
"""What the names of moments and master weights begin with in a checkpoint."""
# The distributed optimizer calls a master weight `param`, the plain bf16 one `fp32_param`.
_DISTRIBUTED_MASTER = f"{OPTIMIZER_PREFIX}param."
MASTER_PREFIX = f"{OPTIMIZER_PREFIX}fp32_param."
"""What the names of fp32 master weights begin with; the weight's own name follows."""


def optimizer_state(
    optimizer: ChainedOptimizer, model: Mapping[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """Return the optimizer's sharded state, to save or to load into.

    Args:
        optimizer: with initialised moments.
        model: the sharded state dicts of the model chunks, by chunk.
        is_loading: the tensors are only places to load into.

    Returns:
        For each chained optimizer its state dict, in which moments and master weights are
        sharded tensors and everything else is local to the run.
    """
    state = {}
    for index, inner in enumerate(optimizer.chained_optimizers):
        if inner.optimizer is None or _is_empty(inner):
            continue
        with _without_padding(inner):
            inner_state = inner.sharded_state_dict(
                _flat(model), is_loading=is_loading, metadata=_METADATA
            )
        if isinstance(inner, DistributedOptimizer) and not inner.config.bf16:
            _share_weights(inner, inner_state)
        state[str(index)] = _layout_free(inner_state)
    return state


def load_optimizer_state(
    optimizer: ChainedOptimizer, loaded: Mapping[str, Any], *, steps: int
) -> None:
    """Restore loaded moments and master weights, after `steps` updates."""
    for index, inner in enumerate(optimizer.chained_optimizers):
        if inner.optimizer is not None and not _is_empty(inner):
            inner.load_state_dict(loaded[str(index)])
    for group in optimizer.param_groups:
        group["step"] = steps


def _is_empty(optimizer: MegatronOptimizer) -> bool:
    """Return whether a plain optimizer has no parameters, as where no layer of a rank has experts.

    It is in no checkpoint: megatron-core cannot load it, and its empty lists, which are not
    sharded, would be rank 0's word on those of others.
    """
    return not isinstance(optimizer, DistributedOptimizer) and not optimizer.get_parameters()


@contextmanager
def _without_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let a buffer's parameters be where the distributed optimizer looks for their state.

    It collects a buffer's state without the padding that ends a bucket, but cuts parameters out at
    their places in the buffer, with the padding. Behind the first padded bucket every parameter
    would get a part of its own state and a part of its neighbour's.
    """
    buffers = optimizer.buffers if isinstance(optimizer, DistributedOptimizer) else []
    places = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            shift, shifts = 0, []
            for bucket in buffer.buckets:
                shifts.append(shift)
                shift += bucket.grad_data.numel() - bucket.numel_unpadded
            buffer.param_index_map = {
                parameter: (start - shifts[index], end - shifts[index], index)
                for parameter, (start, end, index) in buffer.param_index_map.items()
            }
        yield
    finally:
        for buffer, place in zip(buffers, places, strict=True):
            buffer.param_index_map = place


def _flat(model: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the chunks into one name space; megatron-core looks parameters up by identity."""
    return {
        f"{chunk}.{name}": value for chunk, part in model.items() for name, value in part.items()
    }


def _share_weights(optimizer: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Leave fp32 master weights out: they are the model's own, saved and loaded with it.

    megatron-core numbers the parameters of `param_state` in the order of its buffers.
    """
    parameters = [p for buffer in optimizer.buffers for p in buffer.param_index_map]
    for number, parameter in enumerate(parameters):
        state["param_state"][number]["param"] = LocalNonpersistentObject(parameter)


def _layout_free(value: Any) -> Any:
    """Keep sharded tensors, under names without an optimizer's name; mark the rest as local."""
    if isinstance(value, dict):
        return {name: _layout_free(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_layout_free(entry) for entry in value]
    if isinstance(value, LocalNonpersistentObject):
        return value
    if not isinstance(value, ShardedBase):
        return LocalNonpersistentObject(value)
    if value.key.startswith(_DISTRIBUTED_MASTER):
        value.key = MASTER_PREFIX + value.key.removeprefix(_DISTRIBUTED_MASTER)
    return value
