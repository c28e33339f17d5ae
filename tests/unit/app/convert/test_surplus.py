"""What a checkpoint holds besides its weights: left out where it agrees, refused where not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe_app.convert import convert_checkpoint
from moe_app.convert.surplus import HEAD
from moe_ext.convert import ExpertLayout
from tests.distributed.convert_models import make_hf
from tests.unit.app.convert.test_convert_checkpoint import assert_equal_tensors, read_all

ATTENTION = {"olmoe": "self_attn", "jetmoe": "self_attention"}
FAMILIES: list[tuple[str, ExpertLayout]] = [("olmoe", "per-expert"), ("jetmoe", "fused")]
EMBEDDING = "model.embed_tokens.weight"


def run_import(tmp_path: Path, *flags: str) -> int:
    return convert_checkpoint.main(
        ["import", "--hf", str(tmp_path / "hf"), "--save", str(tmp_path / "run"), *flags]
    )


def frequencies(theta: float) -> torch.Tensor:
    """RoPE's for heads of 8, number by number."""
    return torch.tensor([theta ** (-2 * i / 8) for i in range(4)])


def make(
    tmp_path: Path, family: str, form: ExpertLayout, extra: dict[str, torch.Tensor], **changes: Any
) -> dict[str, torch.Tensor]:
    """Write a tied model with further tensors; return its weights."""
    source, weights = make_hf(tmp_path / "hf", family, form, tie_word_embeddings=True, **changes)
    save_file({**weights, **extra}, source / "model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.mark.parametrize(("family", "form"), FAMILIES)
def test_copies_and_buffers_are_compared_and_left_out(
    family: str, form: ExpertLayout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    buffers = [f"model.layers.{n}.{ATTENTION[family]}.rotary_emb.inv_freq" for n in range(2)]
    weights = make(tmp_path, family, form, {}, rope_theta=500.0)
    extra = {
        HEAD: weights[EMBEDDING].clone(),
        buffers[0]: frequencies(500.0),
        buffers[1]: frequencies(500.0).to(torch.bfloat16),
        "model.rotary_emb.inv_freq": frequencies(500.0),
    }
    (tmp_path / "hf").rename(tmp_path / "plain")
    make(tmp_path, family, form, extra, rope_theta=500.0, pretraining_tp=1, unsloth_version="2025")
    assert run_import(tmp_path) == 0
    said = capsys.readouterr().err.splitlines()
    # Without the time of day.
    assert [line[9:] for line in said if "left out" in line] == [
        "left out, as the model is the same without: pretraining_tp of config.json, unsloth_version"
        " of config.json, lm_head.weight, 3 x rotary_emb.inv_freq"
    ]
    report = json.loads((tmp_path / "run" / "conversion_report.json").read_text())
    assert report["left_out"]["config"] == {"pretraining_tp": 1, "unsloth_version": "2025"}
    assert report["left_out"]["tensors"].keys() == extra.keys()
    assert report["num_tensors"] == len(weights)
    assert report["num_bytes"] == sum(tensor.nbytes for tensor in weights.values())
    out = ["export", "--load", str(tmp_path / "run"), "--hf", str(tmp_path / "out")]
    assert convert_checkpoint.main(out) == 0
    assert_equal_tensors(read_all(tmp_path / "out"), weights)


def test_import_without_surplus_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", "olmoe", "per-expert", attention_bias=False, attention_dropout=0.0)
    assert run_import(tmp_path) == 0
    assert "left out" not in capsys.readouterr().err
    assert "left_out" not in json.loads((tmp_path / "run" / "conversion_report.json").read_text())


def altered(tensor: torch.Tensor) -> torch.Tensor:
    found = tensor.clone()
    found[-1, -1] += 0.5
    return found


LAYER_0 = "model.layers.0.self_attn.rotary_emb.inv_freq"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "head differs in its last value": (
        {HEAD: altered},
        "holds lm_head.weight, but its config.json says tie_word_embeddings true, which makes the"
        " output layer the embedding, and the two differ; set tie_word_embeddings to false",
    ),
    "head has more rows": (
        {HEAD: lambda embedding: torch.cat([embedding, embedding[:1]])},
        "holds lm_head.weight, but its config.json says tie_word_embeddings true",
    ),
    "other base": (
        {LAYER_0: lambda _: frequencies(501.0)},
        f"holds {LAYER_0}, which is not what rope_theta 500 gives for 4 frequencies; the weights",
    ),
    "other head size": ({LAYER_0: lambda _: frequencies(500.0)[:3]}, f"holds {LAYER_0}, which is"),
    "layer that is not there": (
        {LAYER_0.replace("0", "2"): lambda _: frequencies(500.0)},
        "1 tensors are unexpected: model.layers.2.self_attn.rotary_emb.inv_freq",
    ),
    "other family's name": (
        {LAYER_0.replace("attn", "attention"): lambda _: frequencies(500.0)},
        "1 tensors are unexpected: model.layers.0.self_attention.rotary_emb.inv_freq",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_that_disagree_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    makers, message = REFUSED[name]
    weights = make(tmp_path, "olmoe", "per-expert", {}, rope_theta=500.0)
    extra = {each: maker(weights[EMBEDDING]) for each, maker in makers.items()}
    (tmp_path / "hf").rename(tmp_path / "plain")
    make(tmp_path, "olmoe", "per-expert", extra, rope_theta=500.0)
    assert run_import(tmp_path) == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
