"""Check that imports train under every layout, trained ones export, killed ones leave nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron.trainer.checkpoint import CheckpointReader
from moe_app.convert import convert_checkpoint
from tests.distributed.convert_models import make_hf
from tests.distributed.launcher import HERE, Outcome, alone, run_cases

LAYOUTS = {
    "tp2": {"tensor-model-parallel-size": 2},
    "ep2": {"expert-model-parallel-size": 2},
    "pp2": {"pipeline-model-parallel-size": 2},
}


def convert(*arguments: object) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def training(run: Path, **settings: object) -> list[str]:
    """Return flags that continue from an imported checkpoint."""
    chosen = {
        "config": run / "iter_0000000" / "config.yaml",
        "load": run,
        "seq-length": 16,
        "global-batch-size": 4,
        "log-interval": 1,
        "eval-iters": 1,
        "device": "cpu",
        **settings,
    }
    return [
        "--mock-data",
        *(str(word) for key, value in chosen.items() for word in (f"--{key}", value)),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Import three checkpoints: `olmoe` fp32, `bf16`, `jetmoe` fp32."""
    root = tmp_path_factory.mktemp("convert")
    for name, family, form, dtype in (
        ("olmoe", "olmoe", "per-expert", torch.float32),
        ("bf16", "olmoe", "fused", torch.bfloat16),
        ("jetmoe", "jetmoe", "fused", torch.float32),
    ):
        source, _ = make_hf(root / "hf" / name, family, form, dtype=dtype)  # type: ignore[arg-type]
        assert convert("import", "--hf", source, "--save", root / name) == 0
    return root


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict[str, Outcome]:
    still: dict[str, object] = {"train-iters": 1, "lr": 1e-30, "min-lr": 0, "weight-decay": 0}
    cases = {name: training(root / "olmoe", **still, **layout) for name, layout in LAYOUTS.items()}
    cases["jetmoe"] = training(root / "jetmoe", **still, **LAYOUTS["pp2"])
    cases["trained"] = training(
        root / "bf16", save=root / "trained", **{"train-iters": 3, "lr": 0.01}, **LAYOUTS["ep2"]
    )
    return run_cases(2, cases, root / "cases")


@pytest.mark.parametrize("name", [*LAYOUTS, "jetmoe"])
def test_load_restores_the_imported_weights(
    name: str, root: Path, outcomes: dict[str, Outcome]
) -> None:
    """Take one step whose learning rate is lost in rounding, so that weights stay as loaded."""
    outcome = outcomes[name]
    assert outcome.error is None
    assert outcome.series("iteration")[0] == 1
    family = name if name == "jetmoe" else "olmoe"
    with CheckpointReader(root / family / "iter_0000000") as reader:
        assert outcome.weights.keys() == reader.tensors.keys()
        for key, stored in reader.tensors.items():
            imported = reader.read(key, (0,) * len(stored.shape), stored.shape)
            assert torch.equal(outcome.weights[key], imported), key


def exported(root: Path, name: str, *flags: str) -> dict[str, torch.Tensor]:
    out = root / name
    like = root / "hf" / "bf16"
    assert convert("export", "--load", root / "trained", "--hf", out, "--like", like, *flags) == 0
    return load_file(out / "model.safetensors")


def test_checkpoint_trained_on_two_ranks_matches_transformers(
    root: Path, outcomes: dict[str, Outcome]
) -> None:
    assert outcomes["trained"].error is None
    exported(root, "verified", "--verify")
    report: dict[str, Any] = json.loads((root / "verified" / "conversion_report.json").read_text())
    assert report["verification"]["passed"] is True
    assert report["verification"]["compute_dtype"] == "float32"
    assert report["iteration"] == 3
    before = load_file(root / "hf" / "bf16" / "model.safetensors")
    after = exported(root, "fused", "--layout", "fused")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(before)


def test_fp32_export_takes_the_master_weights(root: Path, outcomes: dict[str, Outcome]) -> None:
    assert outcomes["trained"].error is None
    masters = exported(root, "masters", "--dtype", "fp32")
    rounded = exported(root, "rounded")
    assert masters.keys() == rounded.keys()
    for name, master in masters.items():
        assert master.dtype is torch.float32
        assert torch.equal(master.bfloat16(), rounded[name]), name
        assert not torch.equal(master, rounded[name].float()), name
    reported = {
        name: json.loads((root / name / "conversion_report.json").read_text())["weights"]
        for name in ("masters", "rounded")
    }
    assert reported == {
        "masters": "fp32 master weights of a bf16 run",
        "rounded": "torch.bfloat16 weights",
    }


def test_killed_conversion_leaves_nothing_that_looks_valid(tmp_path: Path) -> None:
    done = alone(HERE / "convert_kill_worker.py", str(tmp_path), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    *rounds, end = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == 10
    for found in rounds:
        assert found["status"] == -9, found
        # A checkpoint without a tracker file is valid; it is not overwritten.
        is_done = found["moment"] == "before the tracker"
        assert (found["valid"], found["again"]) == ((True, 2) if is_done else (False, 0)), found
    assert end == {"left": ["hf", "run"]}
