"""Say which settings of a model's routing contradict each other."""

from moe_ext.model_fields import ModelFields


def routing_problems(model: ModelFields) -> list[str]:
    """Say which settings of the routing contradict each other."""
    found = []
    has_routers = model.num_experts is not None or model.is_moa
    if model.moe_router_enable_expert_bias and not has_routers:
        found.append(
            "moe_router_enable_expert_bias (True) needs experts, but num_experts is None; set it"
            " to False, or set num_experts"
        )
    if not model.moe_router_bias_update_rate >= 0:
        found.append(
            f"moe_router_bias_update_rate ({model.moe_router_bias_update_rate}) must not be"
            " negative; use 0 to keep the biases as they are"
        )
    if not model.has_varying_experts:
        return found
    name, value = "moe_expert_capacity_factor", str(model.moe_expert_capacity_factor)
    if model.is_expert_choice:
        name, value = "router", f"'{model.router}'"
        found += _expert_choice_problems(model)
    if model.is_moa:
        found.append(
            f"{name} ({value}) gives tokens unequal numbers of experts, but moa attention makes"
            " k query heads of each token; use another attention, or another router without"
            " capacity"
        )
    elif model.num_experts is None:
        found.append(f"{name} ({value}) needs experts, but num_experts is None; set num_experts")
    if model.moe_token_dispatcher_type == "flex":
        found.append(
            f"moe_token_dispatcher_type (flex) sends k rows of each token, but {name} ({value})"
            " makes their number vary; use alltoall or allgather"
        )
    return found


def _expert_choice_problems(model: ModelFields) -> list[str]:
    """Say what an expert choice router has no use for: experts choose equal numbers of tokens."""
    unused: dict[str, tuple[object, object]] = {
        "moe_aux_loss_coeff": (model.moe_aux_loss_coeff, 0.0),
        "moe_expert_capacity_factor": (model.moe_expert_capacity_factor, None),
        "moe_router_enable_expert_bias": (model.moe_router_enable_expert_bias, False),
    }
    return [
        f"{name} ({value}) must be {off} with router '{model.router}', whose experts are balanced"
        f" because each takes equally many tokens; set it to {off}, or use another router"
        for name, (value, off) in unused.items()
        if value != off
    ]
