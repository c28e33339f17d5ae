"""Check smaller refusals of the converter, and when its two sides hold the same values."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_app.convert import convert_checkpoint, hf_verify, weights
from moe_app.convert.checks import can_represent
from moe_ext.convert import family_from_config
from tests.distributed.convert_models import make_hf

OLMOE = {"model_type": "olmoe", "vocab_size": 96}


def convert(*arguments: object) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_represents_another_if_a_round_trip_is_exact(
    wide: torch.dtype, narrow: torch.dtype
) -> None:
    limits = torch.finfo(narrow)
    numbers = torch.tensor([limits.max, limits.smallest_normal, 1 + limits.eps], dtype=narrow)
    survives = torch.equal(numbers.to(wide).to(narrow), numbers)
    assert can_represent(wide, narrow) is survives


def test_an_exact_conversion_is_verified_in_float32(tmp_path: Path) -> None:
    """Use the tight bound, because bf16 weights are exact in fp32."""
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert")  # bf16
    run, out = tmp_path / "run", tmp_path / "out"
    assert convert("import", "--hf", source, "--save", run, "--dtype", "fp32", "--verify") == 0
    assert convert("export", "--load", run, "--hf", out, "--dtype", "bf16", "--verify") == 0
    reported = [
        json.loads((place / "conversion_report.json").read_text())["verification"]
        for place in (run, out)
    ]
    # The export rounds fp32 to bf16: exact here, but not in general.
    assert [each["compute_dtype"] for each in reported] == ["float32", "bfloat16"]
    assert reported[0]["max_abs"] <= hf_verify.FP32_TOLERANCE * max(1.0, reported[0]["std"])


def test_export_into_its_checkpoint_is_refused_and_leaves_it_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert")
    run = tmp_path / "run"
    assert convert("import", "--hf", source, "--save", run) == 0
    capsys.readouterr()
    inside = run / "iter_0000000" / "out"
    assert convert("export", "--load", run, "--hf", inside) == 2
    assert f"{inside} lies in the checkpoint" in capsys.readouterr().err
    assert convert("export", "--load", run, "--hf", tmp_path / "out") == 0


def test_tied_model_with_an_output_layer_is_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = {}
    for path in source.glob("*.safetensors"):
        tensors.update(load_file(path))
        path.unlink()
    for index in source.glob("*.index.json"):
        index.unlink()
    assert "lm_head.weight" in tensors
    save_file(tensors, source / "model.safetensors")
    assert convert("import", "--hf", source, "--save", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "holds lm_head.weight, but its config.json says tie_word_embeddings true" in said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token_id": "x"}, "eos_token_id is 'x'; it must be null, a number or a list of them"),
        ({"bos_token_id": [1, True]}, "bos_token_id is [1, True]; it must be null, a number"),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
                "rope_scaling": {"rope_type": "default"},
            },
            "rope_scaling is {'rope_type': 'default'}; they are two spellings of one setting",
        ),
    ],
)
def test_malformed_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    config = {**OLMOE, **fields}
    with pytest.raises(ValueError, match=re.escape(message)):
        family_from_config(config).model_config(config)


@pytest.mark.parametrize("termination_signal", [signal.SIGINT, signal.SIGTERM])
def test_termination_signal_leaves_no_files(
    termination_signal: signal.Signals,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert")
    run, out = tmp_path / "run", tmp_path / "out"
    assert convert("import", "--hf", source, "--save", run) == 0
    # A shell that runs the tests in the background ignores SIGINT.
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        weights, "check_finite", lambda *_: os.kill(os.getpid(), termination_signal)
    )
    try:
        assert convert("export", "--load", run, "--hf", out) == 130
        shutil.rmtree(run)
        capsys.readouterr()
        assert convert("import", "--hf", source, "--save", run) == 130
    finally:
        signal.signal(signal.SIGINT, interrupts)
    said = capsys.readouterr().err
    assert said.endswith("interrupted; unfinished output has been removed\n")
    assert os.listdir(tmp_path) == ["hf"]
    assert signal.getsignal(signal.SIGTERM) is before
