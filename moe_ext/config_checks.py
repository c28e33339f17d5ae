"""Say what is wrong with a model's fields, and with the layout it is to be trained in."""

from moe_ext.model_fields import ModelFields
from moe_ext.routing_checks import routing_problems


def architecture_problems(model: ModelFields) -> list[str]:
    """Return what is wrong with the architecture itself, one message each; empty if valid."""
    found = _size_problems(model)
    if not found:
        found += _attention_problems(model)
        found += _expert_problems(model)
        found += routing_problems(model)
    return found + _range_problems(model)


def layout_problems(
    model: ModelFields,
    *,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    virtual_stages: int,
    expert_model_parallel_size: int,
    expert_tensor_parallel_size: int,
    sequence_parallel: bool,
    seq_length: int,
    is_training: bool = True,
) -> list[str]:
    """Return what prevents this parallel layout, one message each; empty if valid.

    Args:
        model: the architecture.
        tensor_model_parallel_size: ranks per attention or embedding matrix, at least 1.
        pipeline_model_parallel_size: stages, at least 1.
        virtual_stages: model chunks per pipeline rank, at least 1.
        expert_model_parallel_size: ranks per layer's experts, at least 1.
        expert_tensor_parallel_size: ranks per expert, at least 1.
        sequence_parallel: whether activations are split along the sequence.
        seq_length: tokens per sequence (s).
        is_training: whether backward passes will run.
    """
    tensor = ("tensor_model_parallel_size", tensor_model_parallel_size)
    pairs = [("num_attention_heads", model.num_attention_heads, *tensor)]
    if model.num_query_groups is not None:
        pairs.append(("num_query_groups", model.num_query_groups, *tensor))
    if sequence_parallel:
        pairs.append(("seq_length", seq_length, *tensor))
    if model.num_experts is None:
        pairs.append(("ffn_hidden_size", model.ffn_hidden_size or 0, *tensor))
    else:
        expert = ("expert_model_parallel_size", expert_model_parallel_size)
        expert_tensor = ("expert_tensor_parallel_size", expert_tensor_parallel_size)
        if model.has_dense_layers:
            pairs.append(("ffn_hidden_size", model.ffn_hidden_size or 0, *tensor))
        pairs.append(("num_experts", model.num_experts, *expert))
        pairs.append(("moe_ffn_hidden_size", model.moe_ffn_hidden_size, *expert_tensor))
        if (shared := model.moe_shared_expert_intermediate_size) is not None:
            pairs.append(("moe_shared_expert_intermediate_size", shared, *tensor))
    found = [message for pair in pairs for message in _divisibility_problems(*pair)]
    found += _chunk_problems(model, pipeline_model_parallel_size, virtual_stages)
    if model.padded_vocab_size % tensor_model_parallel_size:
        found.append(
            f"the padded vocabulary ({model.padded_vocab_size}, vocab_size"
            f" {model.vocab_size} rounded up) must be a multiple of tensor_model_parallel_size"
            f" ({tensor_model_parallel_size}); set make_vocab_size_divisible_by"
            f" ({model.make_vocab_size_divisible_by}) to a multiple of it"
        )
    chunks = pipeline_model_parallel_size * virtual_stages
    if model.moe_share_across_layers and chunks > 1:
        found.append(
            "moe_share_across_layers (True) has one feed-forward for all layers, which chunks of a"
            f" pipeline (pipeline_model_parallel_size {pipeline_model_parallel_size} x"
            f" num_virtual_stages_per_pipeline_rank {virtual_stages}) would each have a copy of;"
            " use a pipeline parallel size of 1"
        )
    if model.num_experts is None and expert_model_parallel_size > 1:
        found.append(
            f"expert_model_parallel_size ({expert_model_parallel_size}) must be 1 for a dense"
            " model (num_experts None); set it to 1, or set num_experts"
        )
    found += _dispatcher_problems(model, expert_model_parallel_size, expert_tensor_parallel_size)
    is_split = tensor_model_parallel_size > 1 and is_training
    if model.num_experts is not None and is_split and not sequence_parallel:
        found.append(
            f"sequence_parallel (False) must be on when a model with num_experts"
            f" ({model.num_experts}) has tensor_model_parallel_size"
            f" ({tensor_model_parallel_size}) above 1, or megatron-core refuses to train; drop"
            " --no-sequence-parallel, or use a tensor parallel size of 1"
        )
    return found


def _dispatcher_problems(model: ModelFields, expert: int, expert_tensor: int) -> list[str]:
    is_local = model.num_experts is not None and expert * expert_tensor == 1
    if model.moe_token_dispatcher_type != "flex" or not is_local:
        return []
    return [
        "moe_token_dispatcher_type (flex) needs expert_model_parallel_size (1) or"
        " expert_tensor_parallel_size (1) above 1, because it has nothing to send where a rank"
        " holds all experts; use alltoall, or more ranks for the experts"
    ]


def _size_problems(model: ModelFields) -> list[str]:
    sizes: dict[str, int | None] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_experts": model.num_experts,
        "moe_layer_freq": model.moe_layer_freq,
        "moe_router_topk": model.moe_router_topk,
        "moa_num_experts": model.moa_num_experts,
        "moa_router_topk": model.moa_router_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "vocab_size": model.vocab_size,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
    }
    return [
        f"{name} ({size}) must be at least 1; use a positive number"
        for name, size in sizes.items()
        if size is not None and size < 1
    ]


def _attention_problems(model: ModelFields) -> list[str]:
    if model.is_moa:
        return _moa_problems(model)
    found = [
        f"{name} ({value}) is set, but attention is '{model.attention}'; set attention to"
        f" 'moa', or {name} to None"
        for name, value in (
            ("moa_num_experts", model.moa_num_experts),
            ("moa_router_topk", model.moa_router_topk),
        )
        if value is not None
    ]
    heads, head_size = model.num_attention_heads, model.kv_channels
    source = "kv_channels"
    if head_size is None:
        source = "hidden_size / num_attention_heads"
        if model.hidden_size % heads:
            found.append(
                f"hidden_size ({model.hidden_size}) must be a multiple of num_attention_heads"
                f" ({heads}) when kv_channels is not set; use a hidden size of"
                f" {_nearest_multiples(model.hidden_size, heads)}, or set kv_channels"
            )
        else:
            head_size = model.hidden_size // heads
    if head_size is not None:
        found += _head_size_problems(source, head_size)
    groups = model.num_query_groups
    if groups is not None:
        found += _divisibility_problems("num_attention_heads", heads, "num_query_groups", groups)
    return found


def _moa_problems(model: ModelFields) -> list[str]:
    experts, topk = model.attention_experts, model.attention_topk
    if experts is None:
        return [
            "moa_num_experts (None) must be set when attention is 'moa' and num_experts is"
            " None; set the experts of the attention, or another attention"
        ]
    found = []
    if topk > experts:
        found.append(
            f"the experts per token of the attention (moa_router_topk {model.moa_router_topk},"
            f" moe_router_topk {model.moe_router_topk}: {topk}) must be at most its experts"
            f" ({experts}); use a moa_router_topk of 1 to {experts}"
        )
    heads = model.num_attention_heads
    groups = heads if model.num_query_groups is None else model.num_query_groups
    if heads != groups * topk:
        found.append(
            f"num_attention_heads ({heads}) must be num_query_groups x the experts per token of"
            f" the attention ({groups} x {topk}) when attention is 'moa', because each chosen"
            " expert brings one query head for each key/value head; use num_attention_heads"
            f" {groups * topk}"
        )
    if model.kv_channels is None:
        found.append(
            f"kv_channels (None) must be set when attention is 'moa', whose heads count once"
            " for each chosen expert; set the size of a head, for example hidden_size /"
            f" num_query_groups = {model.hidden_size / groups:g}"
        )
    else:
        found += _head_size_problems("kv_channels", model.kv_channels)
    return found


def _expert_problems(model: ModelFields) -> list[str]:
    if model.num_experts is None:
        return _dense_problems(model)
    found = []
    if model.moe_router_topk > model.num_experts:
        found.append(
            f"moe_router_topk ({model.moe_router_topk}) must be at most num_experts"
            f" ({model.num_experts}); use 1 to {model.num_experts} experts per token"
        )
    if model.moe_layer_freq > model.num_layers:
        found.append(
            f"moe_layer_freq ({model.moe_layer_freq}) must be at most num_layers"
            f" ({model.num_layers}), or no layer has experts; use 1 to {model.num_layers}, or set"
            " num_experts to None"
        )
    if model.has_dense_layers and model.ffn_hidden_size is None:
        found.append(
            f"ffn_hidden_size (None) must be set when moe_layer_freq ({model.moe_layer_freq})"
            " leaves layers dense; set their feed-forward width"
        )
    return found


def _dense_problems(model: ModelFields) -> list[str]:
    """List what is wrong without experts."""
    shared = model.moe_shared_expert_intermediate_size
    needing = (
        ("moe_output_bias", model.moe_output_bias, False, False),
        ("moe_shared_expert_intermediate_size", shared, None, None),
        ("moe_layer_freq", model.moe_layer_freq, 1, 1),
        ("moe_share_across_layers", model.moe_share_across_layers, False, False),
    )
    found = [
        f"{name} ({value}) needs experts, but num_experts is None; set it to {off}, or set"
        " num_experts"
        for name, value, default, off in needing
        if value != default
    ]
    if model.ffn_hidden_size is None:
        found.append(
            "ffn_hidden_size (None) must be set when num_experts is None, which is a dense"
            " model; set the feed-forward width, or set num_experts"
        )
    return found


def _range_problems(model: ModelFields) -> list[str]:
    positive = {
        "rotary_base": model.rotary_base,
        "norm_epsilon": model.norm_epsilon,
        "final_norm_epsilon": model.final_norm_epsilon,
        "init_method_std": model.init_method_std,
        "init_method_cutoff": model.init_method_cutoff,
        "moe_expert_capacity_factor": model.moe_expert_capacity_factor,
    }
    not_negative = {
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff,
    }
    found = [
        f"{name} ({value}) must be above 0; use a positive number"
        for name, value in positive.items()
        if value is not None and not value > 0
    ]
    return found + [
        f"{name} ({value}) must not be negative; use 0 to switch the loss off"
        for name, value in not_negative.items()
        if not value >= 0
    ]


def _chunk_problems(model: ModelFields, stages: int, virtual_stages: int) -> list[str]:
    chunks = stages * virtual_stages
    if model.num_layers % chunks == 0:
        return []
    return [
        f"num_layers ({model.num_layers}) must be a multiple of pipeline_model_parallel_size x"
        f" num_virtual_stages_per_pipeline_rank ({stages} x {virtual_stages} = {chunks}); use"
        f" {_nearest_multiples(model.num_layers, chunks)} layers, or other sizes whose product"
        f" is {_divisors(model.num_layers)}"
    ]


def _head_size_problems(source: str, head_size: int) -> list[str]:
    if head_size % 2 == 0:
        return []
    return [
        f"the size of a head ({source} = {head_size}) must be even, because RoPE rotates its"
        f" channels in pairs; use a head size of {_nearest_multiples(head_size, 2)}"
    ]


def _divisibility_problems(name: str, value: int, divisor_name: str, divisor: int) -> list[str]:
    if value % divisor == 0:
        return []
    return [
        f"{name} ({value}) must be a multiple of {divisor_name} ({divisor}); use"
        f" {divisor_name} {_divisors(value)}"
    ]


def _divisors(number: int) -> str:
    """Format the divisors of `number` >= 1 as a choice: "1, 2, 3 or 6"."""
    found = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]


def _nearest_multiples(number: int, step: int) -> str:
    """Format the multiples of `step` next to a `number` that is none, without 0: "99 or 102"."""
    below = number - number % step
    return f"{below} or {below + step}" if below else f"{step}"
