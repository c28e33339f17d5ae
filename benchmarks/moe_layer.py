"""Times one MoE layer, forward and backward, against its peers, under a given routing.

    python -m benchmarks.moe_layer --shape small --routing learned --json layer.json
    python -m benchmarks.moe_layer --shape jetmoe --block attention --device cuda --dtype bf16

Every implementation gets the same hidden states, weights, experts and gates; the router's GEMM is
not timed. Outputs and all gradients are compared before anything is timed. Each implementation has
its own process; they take turns. Functions import what they need, because every process imports
this file.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import DTYPES, chosen, gemm_size, new_parser, shape_of
from benchmarks.report import Work, results, table, write_json
from benchmarks.session import NATIVE, Plan, Session
from benchmarks.shapes import ROUTINGS, Shape, experts_flops, make_routing, moa_flops
from benchmarks.workers import Entry


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement that `argv` describes; return the exit status."""
    from benchmarks.native import usable_backends

    parser = new_parser("moe_layer", "Time one MoE layer against its peers.")
    parser.add_argument("--routing", choices=ROUTINGS, default="learned", help="(%(default)s)")
    parser.add_argument(
        "--block", choices=("experts", "attention"), default="experts",
        help="feed-forward experts, or the mixture of attention heads (%(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    shape, dtype = shape_of(args), DTYPES[args.dtype]
    is_attention = args.block == "attention"
    if is_attention and shape.model.attention_experts is None:
        parser.error(f"--shape {args.shape} has no attention experts; use jetmoe")
    make = attention_entries if is_attention else expert_entries
    plan = Plan(
        entries=chosen(make(shape, args.routing, dtype, args.device), args.only),
        device=torch.device(args.device),
        dtype=dtype,
        rounds=args.rounds,
        warmup=args.warmup,
        gemm_size=gemm_size(args),
        num_threads=args.threads,
        is_fresh=args.fresh,
        peer_timeout_s=args.peer_timeout,
    )
    session = Session(plan)
    session.run()
    found = results(
        session,
        Work(
            num_tokens=shape.num_tokens,
            flops=moa_flops(shape) if is_attention else experts_flops(shape),
            causal_flops=moa_flops(shape, is_causal=True) if is_attention else experts_flops(shape),
        ),
        benchmark="moe_layer",
        arguments=vars(args),
        native_backend=usable_backends(shape.model, args.device, dtype)[0],
        routing=describe_routing(shape, args.routing),
    )
    print(table(found))
    if args.json is not None:
        write_json(found, Path(args.json))
    return session.exit_status


def expert_entries(
    shape: Shape, routing: str, dtype: torch.dtype, device_type: str
) -> dict[str, Entry]:
    """List all implementations of the experts; the first is the project's default."""
    from benchmarks import layer_kernels, layer_megatron, layer_sonic, layer_transformers

    common = (shape, routing, dtype)
    from benchmarks.native import usable_backends

    default, *others = usable_backends(shape.model, device_type, dtype)
    build_own = layer_megatron.build_experts
    found = {NATIVE: Entry(build_own, (*common, f"{NATIVE}:{default}"))}
    for name in (f"{NATIVE}:{backend}" for backend in others):
        found[name] = Entry(build_own, (*common, name))
    is_jetmoe = layer_transformers.family_name(shape) == "jetmoe"
    for name in ("eager",) if is_jetmoe else ("eager", "grouped_mm"):
        build = layer_transformers.build_experts
        found[f"transformers-{name}"] = Entry(
            build, (*common, name), "transformers", layer_transformers.load
        )
    for kind, package in (
        (layer_megatron.SEQUENTIAL, None),
        (layer_megatron.TE_GROUPED, "transformer_engine"),
    ):
        found[kind] = Entry(layer_megatron.build_experts, (*common, kind), package)
    found["megablocks-grouped"] = Entry(layer_kernels.build_megablocks, common, "megablocks")
    found["scattermoe"] = Entry(layer_kernels.build_scattermoe, common, "scattermoe")
    found["sonicmoe"] = Entry(layer_sonic.build, common, "sonicmoe")
    return found


def attention_entries(
    shape: Shape, routing: str, dtype: torch.dtype, device_type: str
) -> dict[str, Entry]:
    """List all implementations of the mixture of attention heads."""
    from benchmarks import layer_kernels, layer_megatron, layer_transformers

    common = (shape, routing, dtype)
    from benchmarks.native import usable_backends

    default, *others = usable_backends(shape.model, device_type, dtype)
    build_own = layer_megatron.build_moa
    return {
        NATIVE: Entry(build_own, (*common, f"{NATIVE}:{default}")),
        **{f"{NATIVE}:{name}": Entry(build_own, (*common, f"{NATIVE}:{name}")) for name in others},
        "transformers-sdpa": Entry(
            layer_transformers.build_moa, common, "transformers", layer_transformers.load
        ),
        "scattermoe": Entry(layer_kernels.build_scattermoe_moa, common, "scattermoe"),
    }


def describe_routing(shape: Shape, kind: str) -> dict[str, Any]:
    """Describe the kind of routing and its figures."""
    model = shape.model
    routing = make_routing(
        kind,
        num_tokens=shape.num_tokens,
        num_experts=model.num_experts or 0,
        topk=model.moe_router_topk,
        rule=model.router,
    )
    return {"kind": kind, **routing.describe()}


if __name__ == "__main__":
    sys.exit(main())
