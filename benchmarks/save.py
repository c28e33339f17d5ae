"""Measures how long a save stops training, in the foreground and in the background.

    python -m benchmarks.save --work /scratch --json save.json

Starts tools/pretrain.py for each kind of save in turn, --rounds times, on random tokens: a dense
model of --gigabytes of state (fp32 weights and AdamW's two moments) that saves every
--save-interval steps. The figures are those of events.jsonl and metrics.jsonl in the run directory.
Left out are the first save of a run, which starts threads, and the last, which the run waits for.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.timing import summarize

_REPO = Path(__file__).resolve().parent.parent
_STATE_BYTES = 12
"""Counts the bytes of a parameter: its weight and two moments in fp32."""
_LAYER_PARAMS = 16
"""Counts a layer's parameters over hidden_size squared: attention 4, SwiGLU of width 4 h 12."""
_HIDDEN = 1024
KINDS = {"foreground": (), "background": ("--async-save",)}


@dataclass
class Saves:
    """Holds the seconds of the saves of one kind."""

    blocked_s: list[float] = field(default_factory=list)
    """Seconds in which training stood still, by save."""
    whole_s: list[float] = field(default_factory=list)
    """Seconds until the checkpoint was complete, by save."""
    num_bytes: int = 0
    """Bytes of a checkpoint's shards."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement that `argv` describes; return the exit status."""
    args = _parser().parse_args(argv)
    found = {kind: Saves() for kind in KINDS}
    for _ in range(args.rounds):
        for kind in KINDS:
            with tempfile.TemporaryDirectory(dir=args.work) as folder:
                _run(args, kind, Path(folder), found[kind])
    print(_table(found))
    if args.json:
        result = {kind: asdict(saves) for kind, saves in found.items()}
        Path(args.json).write_text(json.dumps(result, indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.save", description=__doc__)
    parser.add_argument("--work", default=None, help="where the runs go (the system's own place)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of state (%(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="data parallel (%(default)s)")
    parser.add_argument("--seq-length", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--train-iters", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--save-interval", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    return parser


def _run(args: argparse.Namespace, kind: str, folder: Path, saves: Saves) -> None:
    num_params = args.gigabytes * 1e9 / _STATE_BYTES
    run = folder / "run"
    flags = {
        "preset": "olmoe_1b_7b_dense",
        "hidden-size": _HIDDEN,
        "ffn-hidden-size": 4 * _HIDDEN,
        "num-layers": max(1, round(num_params / (_LAYER_PARAMS * _HIDDEN**2))),
        "vocab-size": 1024,
        "seq-length": args.seq_length,
        "global-batch-size": args.ranks,
        "train-iters": args.train_iters,
        "save-interval": args.save_interval,
        "keep-last": 1,
        "log-interval": 1,
        "save": run,
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(args.ranks), "tools/pretrain.py", "--mock-data"),
        *(part for name, value in flags.items() for part in (f"--{name}", str(value))),
        *KINDS[kind],
    ]
    done = subprocess.run(command, cwd=_REPO, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for event in [event for event in events if event["event"] == "save"][1:-1]:
        saves.blocked_s.append(event["blocked_seconds"])
        saves.whole_s.append(event["seconds"])
    saves.num_bytes = sum(path.stat().st_size for path in run.glob("iter_*/*.distcp"))


def _table(found: dict[str, Saves]) -> str:
    lines = [
        "| save | GB | training stands still, s | complete after, s |",
        "|---|---|---|---|",
    ]
    for kind, saves in found.items():
        blocked, whole = summarize(saves.blocked_s), summarize(saves.whole_s)
        lines.append(
            f"| {kind} | {saves.num_bytes / 1e9:.2f}"
            f" | {blocked.median:.2f} ({blocked.low:.2f} to {blocked.high:.2f})"
            f" | {whole.median:.2f} ({whole.low:.2f} to {whole.high:.2f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
