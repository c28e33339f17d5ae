"""Times whole training steps against transformers: forward, backward, clipping, AdamW.

    python -m benchmarks.train_step --shape small --json step.json
    python -m benchmarks.train_step --shape olmoe --num-layers 4 --device cuda --dtype bf16 --fresh

All start from the same weights and take the same batches; loss and all gradients are compared
before anything is timed. Each implementation has its own process; they take turns. Functions import
what they need, because every process imports this file.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.arguments import DTYPES, chosen, gemm_size, new_parser, shape_of
from benchmarks.report import Work, results, table, write_json
from benchmarks.session import NATIVE, Plan, Session
from benchmarks.shapes import Shape, causal_flops_per_token
from benchmarks.workers import Entry
from moe_ext.counting import training_flops_per_token


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement that `argv` describes; return the exit status."""
    from benchmarks.native import usable_backends

    args = new_parser("train_step", "Time training steps against transformers.").parse_args(argv)
    shape, dtype = shape_of(args), DTYPES[args.dtype]
    session = Session(
        Plan(
            entries=chosen(entries(shape, dtype, args.device), args.only),
            device=torch.device(args.device),
            dtype=dtype,
            rounds=args.rounds,
            warmup=args.warmup,
            gemm_size=gemm_size(args),
            num_threads=args.threads,
            is_fresh=args.fresh,
            peer_timeout_s=args.peer_timeout,
        )
    )
    session.run()
    flops = training_flops_per_token(shape.model, shape.seq_length) * shape.num_tokens
    found = results(
        session,
        Work(
            num_tokens=shape.num_tokens,
            flops=flops,
            causal_flops=causal_flops_per_token(shape.model, shape.seq_length) * shape.num_tokens,
        ),
        benchmark="train_step",
        arguments=vars(args),
        native_backend=usable_backends(shape.model, args.device, dtype)[0],
        losses={
            name: measured.series("loss")
            for name, measured in session.found.items()
            if measured.is_present
        },
    )
    print(table(found))
    if args.json is not None:
        write_json(found, Path(args.json))
    return session.exit_status


def entries(shape: Shape, dtype: torch.dtype, device_type: str) -> dict[str, Entry]:
    """List all implementations; the first is the project's default."""
    from benchmarks import layer_transformers, step_liger, step_peers

    found = {}
    from benchmarks.native import usable_backends

    default, *others = usable_backends(shape.model, device_type, dtype)
    for backend in (default, *others):
        model = dataclasses.replace(shape.model, expert_backend=backend)
        name = NATIVE if backend == default else f"{NATIVE}:{backend}"
        own = dataclasses.replace(shape, model=model)
        found[name] = Entry(step_peers.build_native, (own, dtype))
    is_jetmoe = layer_transformers.family_name(shape) == "jetmoe"
    for experts in ("eager",) if is_jetmoe else ("eager", "grouped_mm"):
        for has_master_weights in (True,) if dtype == torch.float32 else (False, True):
            suffix = "-autocast" if has_master_weights and dtype != torch.float32 else ""
            found[f"transformers-{experts}{suffix}"] = Entry(
                step_peers.build_transformers,
                (shape, dtype, experts, has_master_weights),
                "transformers",
                layer_transformers.load,
            )
    if device_type == "cuda" and not is_jetmoe:
        for has_master_weights in (True,) if dtype == torch.float32 else (False, True):
            suffix = "-autocast" if has_master_weights and dtype != torch.float32 else ""
            found[f"transformers-liger{suffix}"] = Entry(
                step_liger.build, (shape, dtype, has_master_weights), "liger_kernel"
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
