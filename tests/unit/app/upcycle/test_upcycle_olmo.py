"""OLMo's own layout becomes a mixture of experts: norms without weights, no norm of queries."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron.trainer.checkpoint import CheckpointReader, find_checkpoint
from megatron.trainer.records.run_dir import CONFIG_NAME
from moe_app.pretrain.config import read_saved_config
from moe_app.upcycle import upcycle_command
from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.layers.transformer import transformer_config
from tests.distributed.hf_models import fill, random_model, random_tokens

RULE = ("--num-experts", "4", "--moe-router-topk", "2", "--granularity", "2")


def upcycled(source: Path, run: Path, *rule: str) -> tuple[MoEModelConfig, dict[str, Tensor]]:
    assert upcycle_command.main(["--hf", str(source), "--save", str(run), *rule]) == 0
    found = find_checkpoint(run)
    model = read_saved_config(found.path / CONFIG_NAME, prog="test").model
    with CheckpointReader(found.path) as reader:
        weights = {
            key: reader.read(key, (0,) * len(stored.shape), stored.shape)
            for key, stored in reader.tensors.items()
        }
    return model, weights


@pytest.mark.parametrize("is_tied", [False, True])
def test_experts_are_cut_from_olmo_and_preserve_its_logits(
    is_tied: bool, tmp_path: Path, single_rank: ProcessGroupCollection
) -> None:
    reference = random_model("olmo", tie_word_embeddings=is_tied)
    reference.save_pretrained(tmp_path / "hf")
    model, weights = upcycled(tmp_path / "hf", tmp_path / "run", *RULE, "--preserve-function")
    assert (model.normalization, model.attention) == ("NonParametricLayerNorm", "standard")
    assert model.untie_embeddings_and_output_weights is not is_tied
    assert not [key for key in weights if "norm" in key]

    dense: Any = reference.model
    for layer, block in enumerate(dense.layers):
        gate, up, down = (
            getattr(block.mlp, f"{name}_proj").weight for name in ("gate", "up", "down")
        )
        for expert in range(4):
            own = slice(expert % 2 * 14, (expert % 2 + 1) * 14)
            made = weights["decoder.layers.mlp.experts.weight1"][layer, expert]
            assert torch.equal(made, torch.stack([gate[own], up[own]]))
            made = weights["decoder.layers.mlp.experts.weight2"][layer, expert]
            assert torch.equal(made, 2 * down[:, own])
        attention = weights["decoder.layers.self_attention.linear_qkv.weight"][layer]
        q, k, v = (getattr(block.self_attn, f"{name}_proj").weight for name in "qkv")
        by_group = [part.unflatten(0, (2, -1)) for part in (q, k, v)]  # of 2 groups of heads
        assert torch.equal(attention, torch.cat(by_group, dim=1).flatten(0, 1))

    config = transformer_config(model, bf16=False)
    (chunk,) = build_model(
        model, config, pg_collection=single_rank, seq_length=128, seed=None
    ).chunks
    fill([chunk], weights)
    tokens = random_tokens(reference.config, batch=3, length=40)
    with torch.no_grad():
        expected = reference(tokens, use_cache=False).logits
        found = chunk.eval()(tokens, torch.arange(40)[None], None)[..., : model.vocab_size]
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0; it must be null: QKV clipping is not supported"),
        ({"model_type": "olmo2"}, "model_type is 'olmo2' (other than OLMo 1, its norms follow"),
        ({"model_type": "hf_olmo"}, "take the model whose name ends in -hf); a dense model must"),
    ],
)
def test_other_olmos_are_refused_naming_what_is_supported(
    fields: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "hf"
    random_model("olmo").save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **fields}))
    command = ["--hf", str(source), "--save", str(tmp_path / "run"), *RULE]
    assert upcycle_command.main(command) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "clip" in message or "one of llama, olmo;" in said
    assert not (tmp_path / "run").exists()
