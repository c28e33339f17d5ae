"""Compares the planner's memory predictions with training runs on this machine.

    python -m benchmarks.plan                   # all layouts: 4 GB of memory, minutes
    python -m benchmarks.plan --only single ep2

The measured value is the peak growth of each rank's resident set since before its model was built.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

REPO = Path(__file__).resolve().parents[1]
_RANK = "benchmarks.plan_rank"
_TIMEOUT_S = 600

Flags = Mapping[str, object]

BASE: Flags = {
    "mock-data": True,
    "num-layers": 4,
    "hidden-size": 512,
    "num-attention-heads": 8,
    "num-experts": 16,
    "moe-router-topk": 4,
    "moe-ffn-hidden-size": 256,
    "vocab-size": 8192,
    "seq-length": 1024,
    "micro-batch-size": 2,
    "global-batch-size": 4,
    "router": "balanced",
}
"""OLMoE's block: 38 million parameters, 0.6 GB of state in fp32."""
_TP2: Flags = {"tensor-model-parallel-size": 2}
_PP2: Flags = {"pipeline-model-parallel-size": 2}
_EP2: Flags = {"expert-model-parallel-size": 2}
_SHARDED: Flags = {"use-distributed-optimizer": True}
_BF16: Flags = {"bf16": True}
_DENSE: Flags = {"num-experts": None, "ffn-hidden-size": 1536, "attention": "standard"}
_MOA: Flags = {
    "attention": "moa",
    "moa-num-experts": 4,
    "num-query-groups": 2,
    "kv-channels": 64,
    "moe-output-bias": True,
}

CASES: Mapping[str, tuple[int, Flags]] = {
    "single": (1, {}),
    "single_bf16": (1, _BF16),
    "recompute_full": (1, {"recompute-granularity": "full"}),
    "recompute_moe_bf16": (1, {"recompute-granularity": "selective", **_BF16}),
    "dense": (1, _DENSE),
    "moa_bf16": (1, {**_MOA, **_BF16}),
    "dp2_sharded": (2, _SHARDED),
    "dp2_sharded_bf16": (2, {**_SHARDED, **_BF16}),
    "tp2": (2, _TP2),
    "tp2_etp1_bf16": (2, {**_TP2, "expert-tensor-parallel-size": 1, **_BF16}),
    "ep2": (2, _EP2),
    "ep2_learned": (2, {**_EP2, "router": "softmax_topk"}),
    "cp2": (2, {"context-parallel-size": 2}),
    "pp2": (2, _PP2),
    "pp2_interleaved_bf16": (2, {**_PP2, "num-virtual-stages-per-pipeline-rank": 2, **_BF16}),
    "tp2_ep2_etp1": (4, {**_TP2, **_EP2, "expert-tensor-parallel-size": 1}),
    "pp2_ep2_sharded_bf16": (4, {**_PP2, **_EP2, **_SHARDED, **_BF16}),
}
"""Number of ranks, and flags in addition to `BASE`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases and print a table; return the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.plan", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), metavar="NAME")
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    args = parser.parse_args(argv)
    names = [name for name in CASES if name in (args.only or CASES)]
    found = {}
    for name in names:
        num_ranks, flags = CASES[name]
        found[name] = measure(num_ranks, flags)
        print(f"{name}: done", file=sys.stderr)
    print(table(found))
    if args.json:
        content = {"machine": describe_machine(), "base": dict(BASE), "cases": found}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(num_ranks: int, flags: Flags) -> list[dict[str, Any]]:
    """Run a case; return the measured and the predicted memory of each rank.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [
                *("env", "OMP_NUM_THREADS=1"),
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(num_ranks), "-m", _RANK, directory),
                *_as_flags({**BASE, **flags}),
            ],
            cwd=REPO,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
        if done.returncode != 0:
            raise RuntimeError(f"a rank failed:\n{done.stderr[-6000:]}")
        files = [Path(directory) / f"rank{rank}.json" for rank in range(num_ranks)]
        return [json.loads(file.read_text("utf-8")) for file in files]


def _as_flags(settings: Flags) -> list[str]:
    found = []
    for name, value in settings.items():
        found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return found


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Format a Markdown table, a row per case: the rank with the highest peak, in MB."""
    lines = [
        "| case | ranks | weights | gradients | optimizer | activations | working |"
        " predicted | measured | predicted / measured | allocated | as trained |",
        "|---|" + "---:|" * 11,
    ]
    for name, ranks in found.items():
        worst = max(ranks, key=lambda each: each["resident"])
        paper, held = worst["footprint"], worst["held"]
        state = paper["state"]
        parts = (*held.values(), paper["activations"], paper["workspace"] + state["buffers"])
        cells = " | ".join(f"{size / 1e6:.1f}" for size in parts)
        allocated = worst["allocated"]
        lines.append(
            f"| {name} | {len(ranks)} | {cells} |"
            f" {paper['peak'] / 1e6:.0f} | {worst['resident'] / 1e6:.0f} |"
            f" {paper['peak'] / worst['resident']:.2f} |"
            f" {'' if allocated is None else f'{allocated / 1e6:.0f}'} |"
            f" {worst['as_trained'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
