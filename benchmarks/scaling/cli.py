"""Measures a training step over tokens, experts, layers and processes; models it over GPUs.

    python -m benchmarks.scaling --sweep tokens --json tokens.json --plot-dir plots
    python -m benchmarks.scaling --sweep experts --json experts.json --plot-dir plots
    python -m benchmarks.scaling --sweep layers --json layers.json --plot-dir plots
    python -m benchmarks.scaling --sweep processes --json processes.json --plot-dir plots
    python -m benchmarks.scaling --sweep model --gpu h200 --intra-gbps 450 --inter-gbps 50
    python -m benchmarks.scaling --sweep runs --expert-backend grouped

The experts sweep keeps k * f and e * f, so parameters and active FLOPs stay the same. The processes
sweep gives each process one thread; the others use torch's threads. docs/scaling.md says what the
model assumes. Each sweep imports what it needs, so that the model runs without the measured ones.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.report import write_json
from benchmarks.shapes import SHAPES

_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep that `argv` names; return the exit status."""
    args = parse_args(argv)
    found = SWEEPS[args.sweep](args)
    if args.json is not None:
        write_json(found, Path(args.json))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="scaling", description="Measure or model the cost of a training step over one size."
    )
    parser.add_argument("--sweep", choices=sorted(SWEEPS), required=True, help="what to vary")
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    parser.add_argument("--plot-dir", metavar="DIR", help="draw scaling_SWEEP.png there")
    measured = parser.add_argument_group("measured sweeps")
    measured.add_argument(
        "--values", type=int, nargs="+", metavar="N",
        help="tokens, experts, layers, processes or GPUs, instead of the default values",
    )  # fmt: skip
    shapes = [name for name, shape in SHAPES.items() if shape.model.attention_experts is None]
    measured.add_argument(
        "--shape", choices=sorted(shapes), help="shape to vary instead of a small OLMoE block"
    )
    measured.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    measured.add_argument("--warmup", type=int, default=2, metavar="N", help="(%(default)s)")
    measured.add_argument("--threads", type=int, metavar="N", help="threads of a point's process")
    measured.add_argument("--gemm-size", type=int, default=2048, metavar="N", help="(%(default)s)")
    measured.add_argument("--no-peer", action="store_true", help="time ours alone")
    measured.add_argument(
        "--layouts", nargs="+", choices=("DP", "EP", "TP", "PP"), default=["DP", "EP", "TP", "PP"],
        help="layouts of the processes sweep",
    )  # fmt: skip
    measured.add_argument(
        "--steps", type=int, default=3, metavar="N",
        help="timed steps per visit in the processes sweep (%(default)s)",
    )  # fmt: skip
    _add_model_flags(parser.add_argument_group("model"))
    runs = parser.add_argument_group("runs, beside the rates of model")
    for flag, default, meaning in (
        ("--memory", 80.0, "GB of a GPU"),
        ("--dollars", 2.0, "for a GPU hour"),
        ("--restart-minutes", 10.0, "from a failure until the last checkpoint is loaded"),
        ("--save-seconds", 10.0, "that training stands still for a checkpoint"),
    ):
        runs.add_argument(
            flag, type=float, default=default, metavar="X", help=f"{meaning} (%(default)s)"
        )
    return parser.parse_args(argv)


def _add_model_flags(model: argparse._ArgumentGroup) -> None:
    from moe_ext.presets import PRESETS

    model.add_argument(
        "--preset", choices=sorted(PRESETS), default="olmoe_1b_7b", help="(%(default)s)"
    )
    model.add_argument(
        "--gpu", default="h100", help="h100, h200 or a file of benchmarks.calibrate (%(default)s)"
    )
    model.add_argument(
        "--gpu-tflops", type=float, metavar="X",
        help="one rate of every product instead, and no time for anything else",
    )  # fmt: skip
    model.add_argument("--expert-backend", default="auto", metavar="NAME", help="(%(default)s)")
    for flag, default, meaning in (
        ("--intra-gbps", 450.0, "GB/s (bytes), one way, out of a GPU within its node"),
        ("--inter-gbps", 50.0, "GB/s (bytes), one way, out of a GPU to other nodes"),
        ("--latency-us", 20.0, "microseconds per call"),
        ("--imbalance", 1.0, "assignments of the busiest expert parallel rank over the mean's"),
    ):
        model.add_argument(
            flag, type=float, default=default, metavar="X", help=f"{meaning} (%(default)s)"
        )
    model.add_argument("--ep", type=int, nargs="+", default=[8, 64], metavar="N", help="EP")
    for flag, default, meaning in (
        ("--tp", 1, "TP"), ("--pp", 1, "PP"), ("--cp", 1, "CP"),
        ("--gpus-per-node", 8, "GPUs per node"), ("--micro-batch-size", 4, "sequences"),
    ):  # fmt: skip
        model.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{meaning} (%(default)s)"
        )


def sweep_points(args: argparse.Namespace) -> Mapping[str, Any]:
    """Run the tokens, experts or layers sweep."""
    from benchmarks.scaling import points

    shapes = points.points(
        args.sweep,
        points.base_shape(args.shape),
        args.values or points.DEFAULT_VALUES[args.sweep],
    )
    found = {
        "sweep": args.sweep,
        "arguments": vars(args),
        "machine": describe_machine(),
        **points.measure(
            shapes,
            points.Measurement(
                rounds=args.rounds,
                warmup=args.warmup,
                num_threads=args.threads,
                gemm_size=args.gemm_size,
                with_peer=not args.no_peer,
            ),
        ),
    }
    print(points.table(args.sweep, found))
    if args.plot_dir is not None:
        from benchmarks.scaling.plots import plot_points

        plot_points(args.sweep, found, _plot(args))
    return found


def sweep_processes(args: argparse.Namespace) -> Mapping[str, Any]:
    """Run the processes sweep."""
    from benchmarks.scaling import processes

    found = {
        "sweep": args.sweep,
        "arguments": vars(args),
        **processes.measure(
            SHAPES[args.shape] if args.shape else processes.PROCESS_BLOCK,
            args.values or (1, 2, 4),
            args.layouts,
            rounds=args.rounds,
            steps=args.steps,
        ),
    }
    print(processes.table(found))
    if args.plot_dir is not None:
        from benchmarks.scaling.plots import plot_processes

        plot_processes(found, _plot(args))
    return found


def sweep_model(args: argparse.Namespace) -> Mapping[str, Any]:
    """Model the step over numbers of GPUs."""
    from benchmarks.scaling import model
    from moe_ext.config import MoEModelConfig
    from moe_ext.cost.cluster import Cluster
    from moe_ext.cost.device import find_device, flat
    from moe_ext.presets import PRESETS

    run = model.Run(
        model=MoEModelConfig(**{**PRESETS[args.preset], "expert_backend": args.expert_backend}),
        gpus=args.values or _GPUS,
        expert=args.ep,
        tensor=args.tp,
        pipeline=args.pp,
        context=args.cp,
        micro_batch_size=args.micro_batch_size,
        imbalance=args.imbalance,
        cluster=Cluster(
            device=find_device(args.gpu) if args.gpu_tflops is None else flat(args.gpu_tflops),
            intra_bytes_per_second=1e9 * args.intra_gbps,
            inter_bytes_per_second=1e9 * args.inter_gbps,
            gpus_per_node=args.gpus_per_node,
            latency_s=1e-6 * args.latency_us,
        ),
    )
    rows = model.rows(run)
    print(f"{model.table(rows)}\n\n{args.preset}: {model.assumptions(run)}")
    if args.plot_dir is not None:
        from benchmarks.scaling.plots import plot_model

        plot_model(rows, f"{args.preset}: {model.assumptions(run)}", _plot(args))
    return {"sweep": args.sweep, "arguments": vars(args), "rows": rows}


def sweep_runs(args: argparse.Namespace) -> Mapping[str, Any]:
    """Model the papers' whole runs, and the same on more GPUs."""
    from benchmarks.scaling import whole_runs

    names = ("gpu", "expert_backend", "intra_gbps", "inter_gbps", "gpus_per_node", "latency_us")
    flags = [
        word
        for name in (*names, "memory", "imbalance", "gpu_tflops")
        if getattr(args, name) is not None
        for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))
    ]
    losses = whole_runs.Losses(restart_s=60 * args.restart_minutes, save_s=args.save_seconds)
    rows = whole_runs.rows(flags, losses, args.dollars)
    print(whole_runs.table(rows))
    return {"sweep": args.sweep, "arguments": vars(args), "rows": rows}


def _plot(args: argparse.Namespace) -> Path:
    return Path(args.plot_dir) / f"scaling_{args.sweep}.png"


SWEEPS: Mapping[str, Callable[[argparse.Namespace], Mapping[str, Any]]] = {
    "tokens": sweep_points,
    "experts": sweep_points,
    "layers": sweep_points,
    "processes": sweep_processes,
    "model": sweep_model,
    "runs": sweep_runs,
}
"""Sweeps by the name that --sweep takes."""
