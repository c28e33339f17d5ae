"""List the collectives that log what routers did."""

from moe_ext.config import MoEModelConfig
from moe_ext.cost.collective import Collective, make_collective
from moe_ext.cost.param_shards import Layout

_FP64 = 8


def record_collectives(model: MoEModelConfig, layout: Layout) -> list[Collective]:
    """List the collectives that log the routers' metrics, once every `log_interval` steps."""
    found = []
    for experts in (model.num_experts, model.attention_experts):
        if experts is not None:
            size = model.num_layers * (5 + experts) * _FP64
            found.append(make_collective(layout, "all_reduce", "world", 1, size, "records"))
    return [each for each in found if each.num_ranks > 1]
