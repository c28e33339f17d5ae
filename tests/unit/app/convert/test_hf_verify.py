"""Check that verification accepts a correct conversion and rejects several kinds of wrong ones."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.trainer.checkpoint import FoundCheckpoint, find_checkpoint
from megatron.trainer.errors import CheckpointError, ConfigError
from moe_app.convert import convert_checkpoint, hf_verify
from moe_app.convert.hf_verify import bf16_tolerance, compare, verify
from tests.distributed.hf_models import random_model

# torch's checkpoint loader uses a class it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[FoundCheckpoint, Path]:
    """Return a native checkpoint in fp32 and the Hugging Face directory it came from."""
    directory = tmp_path_factory.mktemp("verify")
    random_model("olmoe", eos_token_id=None).save_pretrained(directory / "hf")
    arguments = ["import", "--hf", str(directory / "hf"), "--save", str(directory / "run")]
    assert convert_checkpoint.main(arguments) == 0
    return find_checkpoint(directory / "run"), directory / "hf"


def changed(hf: Path, copy: Path, **tensors: Tensor | None) -> Path:
    """Copy a Hugging Face directory with other tensors; None leaves one out."""
    copy.mkdir()
    (copy / "config.json").write_bytes((hf / "config.json").read_bytes())
    weights: dict[str, Any] = {**load_file(hf / "model.safetensors"), **tensors}
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_equal_weights_pass_with_a_margin(imported: tuple[FoundCheckpoint, Path]) -> None:
    found, hf = imported
    report = verify(found, hf, device="cpu")
    assert report["passed"]
    assert 0 < report["max_abs"] <= report["tolerance"] / 4
    assert report["top1_agreement"] == 1.0
    assert 0 <= report["mean_kl"] <= 1e-9
    assert (report["compute_dtype"], report["batch_size"], report["length"]) == ("float32", 2, 64)
    json.dumps(report)


def test_one_swapped_expert_fails(imported: tuple[FoundCheckpoint, Path], tmp_path: Path) -> None:
    found, hf = imported
    name = "model.layers.1.mlp.experts.4.{}_proj.weight"
    weights = load_file(hf / "model.safetensors")
    swapped = {
        name.format("gate"): weights[name.format("up")],
        name.format("up"): weights[name.format("gate")],
    }
    report = verify(found, changed(hf, tmp_path / "hf", **swapped), device="cpu")
    assert not report["passed"]
    assert report["max_abs"] > 100 * report["tolerance"]


def test_bfloat16_has_its_own_tolerance(
    imported: tuple[FoundCheckpoint, Path], tmp_path: Path
) -> None:
    found, hf = imported
    report = verify(found, hf, device="cpu", precision="bfloat16", length=32)
    assert report["passed"]
    assert report["max_abs"] > hf_verify.FP32_TOLERANCE
    assert report["tolerance"] == bf16_tolerance(2, report["std"])
    # A norm weight left at its initial value.
    forgotten = {"model.norm.weight": torch.ones(48)}
    other = changed(hf, tmp_path / "hf", **forgotten)
    assert not verify(found, other, device="cpu", precision="bfloat16", length=32)["passed"]


def test_models_of_different_precision_are_compared_in_bfloat16(
    imported: tuple[FoundCheckpoint, Path], tmp_path: Path
) -> None:
    found, hf = imported
    rounded = {k: v.bfloat16() for k, v in load_file(hf / "model.safetensors").items()}
    other = changed(hf, tmp_path / "hf", **rounded)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    report = verify(found, other, device="cpu", length=16)
    assert report["passed"]
    assert report["compute_dtype"] == "bfloat16"
    reason = "native weights are float32, Hugging Face's bfloat16"
    assert report["compute_dtype_because"] == reason


def test_missing_tensor_is_refused(imported: tuple[FoundCheckpoint, Path], tmp_path: Path) -> None:
    found, hf = imported
    gone: dict[str, Tensor | None] = {"model.norm.weight": None}
    other = changed(hf, tmp_path / "hf", **gone)
    with pytest.raises(CheckpointError, match=r"only in part: .*missing_keys.*model\.norm\.weight"):
        verify(found, other, device="cpu")


def test_directory_without_config_is_refused(
    imported: tuple[FoundCheckpoint, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"cannot open {tmp_path}/config.json")):
        verify(imported[0], tmp_path)


def test_without_transformers_the_message_names_the_extra(
    imported: tuple[FoundCheckpoint, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'megatron-moe[hf]'")):
        verify(*imported)


def test_distances_match_a_calculation_by_hand() -> None:
    # Two positions, two tokens: probabilities 1/4, 3/4 against 1/2, 1/2; then the same on both.
    reference = torch.tensor([[[0.0, math.log(3.0)], [5.0, 1.0]]])
    native = torch.tensor([[[0.0, 0.0], [5.0, 1.0]]])
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    found = compare(reference, native)
    assert found.max_abs == pytest.approx(math.log(3.0))
    assert found.mean_abs == pytest.approx(math.log(3.0) / 4)
    assert found.std == pytest.approx(reference.std().item())
    assert found.top1_agreement == 0.5
    assert found.mean_kl == pytest.approx(kl / 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_logits_are_refused(value: float) -> None:
    good, bad = torch.zeros(1, 1, 2), torch.tensor([[[0.0, value]]])
    for reference, native, name in ((good, bad, "native"), (bad, good, "Hugging Face")):
        with pytest.raises(CheckpointError, match=f"the {name} model computes logits"):
            compare(reference, native)
