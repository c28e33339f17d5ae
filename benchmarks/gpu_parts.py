"""Lists the parts of the GPU report: commands, limits, and what they leave behind.

Imports neither torch nor megatron-core, so that the report itself holds nothing on the GPU.
"""

import importlib.util
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIG_GPU = 100e9
"""Bytes from which micro-batches of a whole step are 4 sequences, not 2."""
WHOLE_MODEL = 135e9
"""Bytes that all 16 layers of OLMoE-1B-7B take while they train, 125e9 of them state."""
TEST_PROCESSES = 4
_ROUNDS = ["--rounds", "15"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Describes where the report runs."""

    device: str
    """cuda, or cpu for a trial at a tiny size."""
    folder: Path
    """Takes logs and results."""
    gpu_bytes: int | None
    """Memory of the GPU."""

    @property
    def is_trial(self) -> bool:
        """Return whether sizes are tiny."""
        return self.device == "cpu"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Describes one part; paths of results are below the folder."""

    title: str
    """For the page."""
    limit_s: float
    """How long all commands may take."""
    commands: Mapping[str, list[str]]
    """By the file that each leaves: modules of Python and their flags."""
    read: Callable[[Path], Any]
    """Reads such a file."""
    unfit: str | None = None
    """Why this GPU cannot do it; None if it can."""


def read_json(path: Path) -> Any:
    """Read a result."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_tests(path: Path) -> dict[str, Any]:
    """Count the outcomes in pytest's JUnit file; name what did not pass."""
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": []}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        bad = [each for kind in ("failure", "error") if (each := case.find(kind)) is not None]
        skipped = case.find("skipped")
        if bad:
            reason = next(iter((bad[0].get("message") or "").splitlines()), "")
            found["failed"].append(f"{name}: {reason[:160]}")
        elif skipped is not None:
            found["skipped"].append(f"{name}: {skipped.get('message')}")
        else:
            found["passed"] += 1
    return found


DEFAULT = {
    "cuda": ("tests", "pretrain", "layer", "profile", "step", "moa", "routings", "whole"),
    "cpu": ("tests", "pretrain", "layer", "profile", "step", "moa"),
}
"""Names of the parts that run, by device, unless others are asked for."""


def parts(setup: Setup) -> dict[str, Part]:
    """Return all parts by name, in the order in which they run."""
    return {
        "tests": _tests(setup),
        "pretrain": _pretrain(setup),
        "layer": _layers(setup, "Layer of experts", 400.0, ("learned",)),
        "profile": _profile(setup),
        "step": _step(setup),
        "moa": _moa(setup),
        "routings": _layers(
            setup, "Layer of experts, other routings", 300.0, ("balanced", "skewed")
        ),
        "whole": _whole(setup),
    }


def _tests(setup: Setup) -> Part:
    flags = ["-q", "--tb=short", "-rs", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    flags += ["--maxfail=20", "--junitxml", str(setup.folder / "tests.xml")]
    if not setup.is_trial and importlib.util.find_spec("xdist") is not None:
        flags += ["-n", str(TEST_PROCESSES), "--dist", "loadfile"]
    return Part(
        title="Tests",
        limit_s=400.0,
        commands={"tests.xml": ["pytest", *flags]},
        read=read_tests,
    )


def _training(setup: Setup, name: str, *flags: str) -> dict[str, list[str]]:
    """Return the command of a run at OLMoE-1B-7B's sizes."""
    result = f"{name}.json"
    command = ["benchmarks.pretrain_run", "--result", str(setup.folder / result)]
    if setup.is_trial:
        command += ["--gemm-size", "64", "--device", "cpu", "--preset", "olmoe_tiny"]
        command += ["--seq-length", "64", "--hidden-size", "64", "--vocab-size", "512"]
    else:
        command += ["--device", "cuda", "--preset", "olmoe_1b_7b", "--seq-length", "4096"]
    command += ["--mock-data", "--bf16", "--eval-iters", "1", "--lr", "4e-4"]
    return {result: [*command, "--lr-warmup-iters", "2", *flags]}


def _sizes(micro: int, total: int, steps: int, *, log: int) -> list[str]:
    return [
        *("--micro-batch-size", str(micro), "--global-batch-size", str(total)),
        *("--train-iters", str(steps), "--log-interval", str(log)),
    ]


def _pretrain(setup: Setup) -> Part:
    layers = ["--num-layers", "2"] if setup.is_trial else ["--fit-layers", "8"]
    sizes = _sizes(2, 4, 6, log=2) if setup.is_trial else _sizes(4, 8, 24, log=4)
    return Part(
        title="Training",
        limit_s=240.0,
        commands=_training(setup, "pretrain", *layers, *sizes),
        read=read_json,
    )


def _whole(setup: Setup) -> Part:
    """Train all layers, of which one GPU of 141 GB can hold the state."""
    unfit = None
    if not setup.is_trial and (setup.gpu_bytes or 0) < WHOLE_MODEL:
        unfit = f"all 16 layers need a GPU of {WHOLE_MODEL / 1e9:.0f} GB"
    layers = ["--num-layers", "3" if setup.is_trial else "16"]
    sizes = _sizes(1, 2, 4, log=2) if setup.is_trial else _sizes(1, 16, 8, log=2)
    return Part(
        title="Training the whole model",
        limit_s=400.0,
        commands=_training(setup, "whole", *layers, *sizes),
        read=read_json,
        unfit=unfit,
    )


def _profile(setup: Setup) -> Part:
    sizes = _sizes(2, 2, 4, log=1) if setup.is_trial else _sizes(4, 4, 9, log=1)
    start, end = ("2", "4") if setup.is_trial else ("6", "9")
    steps = ["--profile", "--profile-step-start", start, "--profile-step-end", end]
    steps += ["--save", str(setup.folder / "profile")]
    layers = ["--num-layers", "1" if setup.is_trial else "2"]
    return Part(
        title="Profile",
        limit_s=180.0,
        commands=_training(setup, "profile", *layers, *sizes, *steps),
        read=read_json,
    )


def _benchmark(
    setup: Setup, module: str, shape: str, result: str, *flags: str
) -> dict[str, list[str]]:
    """Return the command of a benchmark beside peers."""
    command = [f"benchmarks.{module}", "--json", str(setup.folder / result), "--dtype", "bf16"]
    if setup.is_trial:
        toy = ["--shape", f"{shape}_toy", "--device", "cpu", "--gemm-size", "64"]
        command += [*toy, "--rounds", "2", "--warmup", "1"]
    else:
        command += ["--shape", shape, "--device", "cuda", "--warmup", "3"]
    return {result: [*command, *flags]}


def _layers(setup: Setup, title: str, limit_s: float, routings: tuple[str, ...]) -> Part:
    # All that there are; in a trial one peer, and none in the other parts, for each takes seconds.
    more = ["--only", "native", "transformers-grouped_mm"] if setup.is_trial else _ROUNDS
    commands: dict[str, list[str]] = {}
    for routing in routings:
        flags = ("--routing", routing, "--peer-timeout", "150", *more)
        commands |= _benchmark(setup, "moe_layer", "olmoe", f"layer_{routing}.json", *flags)
    return Part(title=title, limit_s=limit_s, commands=commands, read=read_json)


def _moa(setup: Setup) -> Part:
    more = ["--only", "native"] if setup.is_trial else _ROUNDS
    flags = ("--block", "attention", "--peer-timeout", "90", *more)
    commands = _benchmark(setup, "moe_layer", "jetmoe", "moa.json", *flags)
    title = "Mixture of attention heads"
    return Part(title=title, limit_s=240.0, commands=commands, read=read_json)


def _step(setup: Setup) -> Part:
    more = ["--only", "native"]
    if not setup.is_trial:
        more += ["native:[cgt]*", "transformers-grouped_mm"]
        micro = "4" if (setup.gpu_bytes or 0) > BIG_GPU else "2"
        more += ["transformers-grouped_mm-autocast", "--rounds", "7"]
        more += ["--num-layers", "2", "--micro-batch-size", micro, "--peer-timeout", "120"]
    commands = _benchmark(setup, "train_step", "olmoe", "step.json", *more)
    return Part(title="Training step", limit_s=300.0, commands=commands, read=read_json)


def command_line(command: list[str]) -> list[str]:
    """Return a command as it is started."""
    return [sys.executable, "-m", *command]
