"""Smaller things that a conversion refuses, and when its two sides hold the same numbers."""

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
from moe_app.convert.checks import holds
from moe_ext.convert import family_from_config
from tests.distributed.convert_models import make_hf

OLMOE = {"model_type": "olmoe", "vocab_size": 96}


def convert(*arguments: object) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16])
def test_a_type_holds_another_where_a_round_trip_changes_nothing(
    wide: torch.dtype, narrow: torch.dtype
) -> None:
    limits = torch.finfo(narrow)
    numbers = torch.tensor([limits.max, limits.smallest_normal, 1 + limits.eps], dtype=narrow)
    survives = torch.equal(numbers.to(wide).to(narrow), numbers)
    assert holds(wide, narrow) is survives


def test_an_exact_conversion_is_verified_in_float32(tmp_path: Path) -> None:
    """bf16 weights are the same numbers in fp32, so the tight bound is the right one."""
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert")  # bf16
    run, out = tmp_path / "run", tmp_path / "out"
    assert convert("import", "--hf", source, "--save", run, "--dtype", "fp32", "--verify") == 0
    assert convert("export", "--load", run, "--hf", out, "--dtype", "bf16", "--verify") == 0
    told = [
        json.loads((place / "conversion_report.json").read_text())["verification"]
        for place in (run, out)
    ]
    # The way back rounds fp32 to bf16: the numbers are the same here, but need not be.
    assert [each["compute_dtype"] for each in told] == ["float32", "bfloat16"]
    assert told[0]["max_abs"] <= hf_verify.FP32_TOLERANCE * max(1.0, told[0]["std"])


def test_an_export_into_its_checkpoint_is_refused_and_leaves_it_whole(
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


def test_a_tied_model_with_an_output_layer_is_told_what_to_change(
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
def test_odd_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    config = {**OLMOE, **fields}
    with pytest.raises(ValueError, match=re.escape(message)):
        family_from_config(config).model_config(config)


@pytest.mark.parametrize("request_to_end", [signal.SIGINT, signal.SIGTERM])
def test_request_to_end_leaves_nothing(
    request_to_end: signal.Signals,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert")
    run, out = tmp_path / "run", tmp_path / "out"
    assert convert("import", "--hf", source, "--save", run) == 0
    # A shell that started the tests in the background has left interrupts ignored.
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(weights, "check_finite", lambda *_: os.kill(os.getpid(), request_to_end))
    try:
        assert convert("export", "--load", run, "--hf", out) == 130
        shutil.rmtree(run)
        capsys.readouterr()
        assert convert("import", "--hf", source, "--save", run) == 130
    finally:
        signal.signal(signal.SIGINT, interrupts)
    said = capsys.readouterr().err
    assert said.endswith("interrupted; what was unfinished has been removed\n")
    assert os.listdir(tmp_path) == ["hf"]
    assert signal.getsignal(signal.SIGTERM) is before
