"""Times `tools/pretrain.py` beside transformers, in turns, with new tokens every step.

    python -m benchmarks.pretrain_turns --dtype fp32 --json turns.json
    python -m benchmarks.pretrain_turns --dtype bf16 --only native transformers-fp32

The command runs as users run it, a process of its own, and so does a plain loop around a model of
transformers; both read one file of tokens whose frequencies follow Zipf's law. All are stopped by a
signal but the one whose turn it is, and a turn ends with the line that the last of its steps
writes. So a turn has everything: data, guard, records, drifting routing. Peak memory is that of the
process while it is timed, with what its imports take. Linux only.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import DTYPES, chosen, shape_of
from benchmarks.layer_transformers import hf_config
from benchmarks.machine import describe_machine
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import Summary, interleave, paired_ratio, summarize
from megatron.trainer.data.writer import TokenFileWriter

NATIVE = "native"
LEARNING_RATE = 1e-4
_STEP = re.compile(r"iteration (\d+)/")
_ROOT = Path(__file__).resolve().parents[1]
_GIGABYTE = 1e9


@dataclass(kw_only=True)
class Turns:
    """Holds the measurements of one implementation, one a turn."""

    seconds: list[float] = field(default_factory=list)
    """Of a step, elapsed."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Of a step, user and system, over all threads."""
    peak_bytes: int = 0
    """Largest resident set of the process while timed."""


class Trainer:
    """Runs a command that writes a line a step, and stops it between its turns.

    Args:
        name: for errors.
        command: writes `iteration N/` when step N is done.
        directory: it runs in.
    """

    def __init__(self, name: str, command: Sequence[str], directory: Path) -> None:
        self._name = name
        self._lines: list[str] = []
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, steps: int) -> tuple[float, float]:
        """Continue for a number of steps; return elapsed and CPU seconds of a step.

        Raises:
            RuntimeError: it ended before that.
        """
        cpu, started = self._cpu_seconds(), time.perf_counter()
        self._signal(signal.SIGCONT)
        for _ in range(steps):
            self._wait_for_step()
        self._signal(signal.SIGSTOP)
        seconds = time.perf_counter() - started
        return seconds / steps, (self._cpu_seconds() - cpu) / steps

    def forget_peak(self) -> None:
        """Start to measure the peak of memory anew."""
        self._file("clear_refs").write_text("5", encoding="ascii")

    def peak_bytes(self) -> int:
        """Return the largest resident set since `forget_peak`."""
        status = self._file("status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def close(self) -> None:
        """End the process."""
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def _wait_for_step(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            if _STEP.search(line):
                return
        raise RuntimeError(f"{self._name} ended too early:\n{''.join(self._lines[-20:])}")

    def _cpu_seconds(self) -> float:
        fields = self._file("stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _file(self, name: str) -> Path:
        return Path(f"/proc/{self._process.pid}/{name}")

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement that `argv` describes; return the exit status."""
    args = _parser().parse_args(argv)
    # A stopped process would outlive this one: let `measure` end them, whoever ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    shape = shape_of(args)
    steps = args.warmup + args.rounds * args.steps + 1
    with tempfile.TemporaryDirectory() as folder:
        commands = chosen(write_commands(Path(folder), shape, args.dtype, steps), args.only)
        found = measure(commands, rounds=args.rounds, steps=args.steps, warmup=args.warmup)
    result = {
        "machine": describe_machine(),
        "arguments": vars(args),
        "tokens_per_step": shape.num_tokens,
        "implementations": {name: dataclasses.asdict(turns) for name, turns in found.items()},
    }
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(found, shape.num_tokens))
    return 0


def measure(
    commands: Mapping[str, Sequence[str]], *, rounds: int, steps: int, warmup: int
) -> dict[str, Turns]:
    """Run all commands in turns.

    Args:
        commands: by name.
        rounds: turns of each.
        steps: of a turn.
        warmup: steps before the first.
    """
    found = {name: Turns() for name in commands}
    trainers: dict[str, Trainer] = {}
    try:
        for name, command in commands.items():
            trainers[name] = Trainer(name, command, _ROOT)
            trainers[name].run(warmup)
            trainers[name].forget_peak()
        for _, name in interleave(list(commands), rounds):
            elapsed, cpu = trainers[name].run(steps)
            found[name].seconds.append(elapsed)
            found[name].cpu_seconds.append(cpu)
            found[name].peak_bytes = trainers[name].peak_bytes()
    finally:
        for trainer in trainers.values():
            trainer.close()
    return found


def write_commands(folder: Path, shape: Shape, dtype: str, steps: int) -> dict[str, list[str]]:
    """Write tokens and a config to a folder; return the command of each implementation.

    Args:
        folder: empty.
        shape: model and batch.
        dtype: a key of DTYPES.
        steps: of each run, at least.
    """
    prefix = folder / "zipf"
    write_tokens(prefix, shape, steps)
    hf_config(shape, DTYPES["fp32"]).save_pretrained(folder)
    batch = {
        "micro-batch-size": shape.micro_batch_size,
        "seq-length": shape.seq_length,
        "train-iters": steps,
        "lr": LEARNING_RATE,
    }
    peer = [sys.executable, "-m", "benchmarks.transformers_loop", f"--config={folder}"]
    peer += [f"--tokens={prefix}.bin", *(f"--{key}={value}" for key, value in batch.items())]
    kinds = {"": "bf16", "-autocast": "autocast", "-fp32": "fp32"}
    if dtype == "fp32":
        kinds = {"": "fp32"}
    return {
        NATIVE: native_command(shape, dtype, {**batch, "data-path": prefix}),
        **{f"transformers{suffix}": [*peer, f"--kind={kind}"] for suffix, kind in kinds.items()},
    }


def native_command(shape: Shape, dtype: str, flags: Mapping[str, object]) -> list[str]:
    """Return the command that trains the shape's model with `tools/pretrain.py`."""
    model = {
        field.name.replace("_", "-"): getattr(shape.model, field.name)
        for field in dataclasses.fields(shape.model)
        if field.name in _SIZES
    }
    more = {
        "preset": "olmoe_1b_7b",
        "global-batch-size": shape.micro_batch_size,
        "lr-decay-style": "constant",
        "lr-warmup-iters": 0,
        "clip-grad": 1.0,
        "log-interval": 1,
        "eval-interval": 0,
        "device": "cpu",
        "split": "1,0",
    }
    given = {**more, **model, **flags}
    precision = "--bf16" if dtype == "bf16" else "--no-bf16"
    return [
        *(sys.executable, str(_ROOT / "tools" / "pretrain.py"), precision),
        *(f"--{key}={value}" for key, value in given.items()),
    ]


_SIZES = {
    *("num_layers", "hidden_size", "num_attention_heads", "num_experts", "moe_router_topk"),
    *("moe_ffn_hidden_size", "vocab_size", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
}


def write_tokens(prefix: Path, shape: Shape, steps: int) -> None:
    """Write a token file, whose n-th most frequent id is 1/n as frequent as the first."""
    vocabulary, batches = shape.model.vocab_size, steps + 4
    number = batches * shape.num_tokens + 1
    uniform = np.random.default_rng(1).random(number)
    ids = np.exp(uniform * math.log(vocabulary + 1)).astype(np.int64) - 1
    with TokenFileWriter(str(prefix), vocab_size=vocabulary) as writer:
        for part in np.array_split(ids.clip(0, vocabulary - 1), batches):
            writer.add_document(part)
        writer.finish()


def table(found: Mapping[str, Turns], tokens: int) -> str:
    """Format a Markdown table: medians (minimum to maximum), ratios within rounds."""
    native = found.get(NATIVE)
    lines = [
        "| implementation | tokens/s | s a step | CPU s a step | peak memory, GB"
        " | time / native's | CPU time / native's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, turns in found.items():
        rates = summarize([tokens / each for each in turns.seconds])
        ratios = ["", ""]
        if native is not None:
            pairs = (
                (turns.seconds, native.seconds),
                (turns.cpu_seconds, native.cpu_seconds),
            )
            ratios = [_spread(paired_ratio(*pair), ".2f") for pair in pairs]
        cells: list[Any] = [
            name,
            _spread(rates, ",.0f"),
            _spread(summarize(turns.seconds), ".2f"),
            _spread(summarize(turns.cpu_seconds), ".2f"),
            f"{turns.peak_bytes / _GIGABYTE:.2f}",
            *ratios,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(summary: Summary, form: str) -> str:
    return f"{summary.median:{form}} ({summary.low:{form}} to {summary.high:{form}})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pretrain_turns", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="(%(default)s)")
    parser.add_argument("--num-layers", type=int, metavar="N", help="override the shape's")
    parser.add_argument("--seq-length", type=int, metavar="N", help="override the shape's")
    parser.add_argument("--micro-batch-size", type=int, metavar="N", help="override the shape's")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="a turn (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="steps (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="implementations to measure")
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
