"""Measures checkpoint conversion against copying the same bytes: time and peak memory.

    python benchmarks/convert.py --work /scratch --json convert.json

Writes a random OLMoE checkpoint of the chosen size to a new directory under --work (1B-7B needs 56
GB there), then copies, imports and exports it --rounds times. Every step is its own process and
ends with an fsync. The directory is always removed at the end.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.trainer.hf_files import HFWriter, plan_shards
from moe_ext.config import MoEModelConfig
from moe_ext.convert import FAMILIES
from moe_ext.presets import PRESETS

_TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
_COPIER = """
import os, shutil, sys
from pathlib import Path
source, target = map(Path, sys.argv[1:])
target.mkdir()
for path in sorted(source.iterdir()):
    shutil.copyfile(path, target / path.name)
    descriptor = os.open(target / path.name, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
"""
_SAMPLE_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Holds the measurement of one step in one round."""

    step: str
    """copy, import or export."""
    seconds: float
    """From the start of the process to its end."""
    cpu_seconds: float
    """User and system time of all threads."""
    peak_anonymous_bytes: int
    """Peak of RssAnon, which excludes file pages."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement that `argv` describes; return the exit status."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.work) as directory:
        work = Path(directory)
        model = MoEModelConfig(**PRESETS[args.preset])
        if args.num_layers is not None:
            model = dataclasses.replace(model, num_layers=args.num_layers)
        num_bytes = make_checkpoint(work / "hf", model)
        print(
            f"{args.preset}, {model.num_layers} layers: {num_bytes / 1e9:.2f} GB of bf16 weights",
            flush=True,
        )
        samples = [sample for _ in range(args.rounds) for sample in one_round(work)]
    print(table(samples, num_bytes))
    if args.json is not None:
        result = {
            "preset": args.preset,
            "num_layers": model.num_layers,
            "num_bytes": num_bytes,
            "cpu_count": os.cpu_count(),
            "samples": [dataclasses.asdict(sample) for sample in samples],
        }
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="convert.py", description="Measure checkpoint conversion against a plain copy."
    )
    parser.add_argument(
        "--work", required=True, metavar="DIR", help="directory on the disk to measure"
    )
    parser.add_argument(
        "--preset", choices=("olmoe_1b_7b", "olmoe_tiny"), default="olmoe_1b_7b", help="size"
    )
    parser.add_argument("--num-layers", type=int, metavar="N", help="fewer layers, for a quick run")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the samples there")
    return parser.parse_args(argv)


def make_checkpoint(directory: Path, model: MoEModelConfig) -> int:
    """Write a Hugging Face checkpoint of random bf16 weights; return the bytes of the weights."""
    family = FAMILIES["olmoe"]
    directory.mkdir()
    config = family.hf_config(
        model,
        max_position_embeddings=4096,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=50279,
        pad_token_id=1,
    )
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = family.hf_tensors(model, "per-expert")
    generator = torch.Generator().manual_seed(1)
    num_bytes = 0
    plans = plan_shards(shapes, torch.bfloat16, max_bytes=5 * 10**9)
    with HFWriter(directory, plans, torch.bfloat16) as writer:
        for name, shape in shapes.items():
            rows = torch.randn(shape, generator=generator, dtype=torch.float32).bfloat16()
            writer.write(name, 0, rows)
            num_bytes += rows.nbytes
        writer.finish()
    return num_bytes


def one_round(work: Path) -> Iterator[Sample]:
    """Copy, import and export; remove each output as soon as it is no longer needed."""
    tool = [sys.executable, str(_TOOL)]
    source, copy, native, exported = (work / name for name in ("hf", "copy", "native", "out"))
    yield measure("copy", [sys.executable, "-c", _COPIER, str(source), str(copy)])
    shutil.rmtree(copy)
    yield measure("import", [*tool, "import", "--hf", str(source), "--save", str(native)])
    yield measure("export", [*tool, "export", "--load", str(native), "--hf", str(exported)])
    compare(source, exported)
    shutil.rmtree(native)
    shutil.rmtree(exported)


def measure(step: str, command: Sequence[str]) -> Sample:
    """Run a process to its end and sample its memory."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(_SAMPLE_S)
        seconds = time.perf_counter() - started
        errors = process.stderr.read() if process.stderr is not None else ""
    if process.returncode:
        raise RuntimeError(f"{step} failed: {errors[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{step}: {seconds:.1f} s, {used:.1f} s of CPU, {peak / 1e6:.0f} MB", flush=True)
    return Sample(step=step, seconds=seconds, cpu_seconds=used, peak_anonymous_bytes=peak)


def anonymous_bytes(pid: int) -> int:
    """Return RssAnon of a Linux process; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else 0


def compare(source: Path, exported: Path) -> None:
    """Check that the exported files equal the source byte for byte."""
    for path in sorted(source.glob("*.safetensors")):
        done = subprocess.run(["cmp", str(path), str(exported / path.name)], check=False)
        if done.returncode:
            raise RuntimeError(
                f"{path.name} differs after import and export; both must be lossless"
            )


def table(samples: Sequence[Sample], num_bytes: int) -> str:
    """Format a Markdown table of the best time of each step, because other load only adds time."""
    lines = [
        "| step | seconds | GB/s | of the copy's speed | CPU seconds | peak RssAnon, GB |",
        "|---|---|---|---|---|---|",
    ]
    steps = {s.step: [other for other in samples if other.step == s.step] for s in samples}
    copy_seconds = min(sample.seconds for sample in steps["copy"])
    for step, found in steps.items():
        seconds = min(sample.seconds for sample in found)
        lines.append(
            f"| {step} | {seconds:.1f} | {num_bytes / seconds / 1e9:.2f} |"
            f" {copy_seconds / seconds:.0%} | {min(s.cpu_seconds for s in found):.1f} |"
            f" {max(s.peak_anonymous_bytes for s in found) / 1e9:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
