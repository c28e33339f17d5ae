"""Convert tiny checkpoints of all families, there and back."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron.trainer.checkpoint import CheckpointReader, find_checkpoint
from megatron.trainer.config.schema import DataConfig
from moe_app.convert import convert_checkpoint
from moe_app.convert.files import hf_files
from moe_app.pretrain.config import PretrainConfig
from moe_ext.convert import FAMILIES, ExpertLayout
from tests.distributed.convert_models import hf_weights, make_hf
from tests.distributed.hf_models import random_model
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer, write_json

CASES: list[tuple[str, ExpertLayout, dict[str, Any]]] = [
    ("olmoe", "per-expert", {}),
    ("olmoe", "fused", {}),
    ("olmoe", "per-expert", {"tie_word_embeddings": True}),
    ("jetmoe", "fused", {}),
    ("olmo", "dense", {}),
]


def convert(*arguments: object) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_equal_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("family", "form", "changes"), CASES)
def test_weights_survive_the_round_trip_bit_for_bit(
    family: str, form: ExpertLayout, changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    source, weights = make_hf(tmp_path / "hf", family, form, dtype=dtype, **changes)
    assert convert("import", "--hf", source, "--save", tmp_path / "run") == 0
    out = tmp_path / "out"
    chosen = () if form == "dense" else ("--layout", form)
    exporting = ("export", "--load", tmp_path / "run", "--hf", out, *chosen)
    assert convert(*exporting, "--max-shard-size", "20KB") == 0
    assert_equal_tensors(read_all(out), weights)
    assert len(list(out.glob("*.safetensors"))) > 1
    back = json.loads((out / "config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    assert {key: back[key] for key in ids} == {key: before[key] for key in ids}
    assert back["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_olmo_is_verified_there_and_back(tmp_path: Path) -> None:
    random_model("olmo").save_pretrained(tmp_path / "hf")
    run, out = tmp_path / "run", tmp_path / "out"
    assert convert("import", "--hf", tmp_path / "hf", "--save", run, "--verify") == 0
    assert convert("export", "--load", run, "--hf", out, "--verify") == 0
    assert json.loads((out / "conversion_report.json").read_text())["family"] == "olmo"


def test_layouts_hold_the_same_experts(tmp_path: Path) -> None:
    source, weights = make_hf(tmp_path / "hf", "olmoe", "per-expert")
    convert("import", "--hf", source, "--save", tmp_path / "run")
    exporting = ("export", "--load", tmp_path / "run", "--layout", "fused")
    assert convert(*exporting, "--hf", tmp_path / "fused") == 0
    fused = read_all(tmp_path / "fused")
    for expert in range(6):
        own = f"model.layers.1.mlp.experts.{expert}"
        both = torch.cat([weights[f"{own}.gate_proj.weight"], weights[f"{own}.up_proj.weight"]])
        assert torch.equal(fused["model.layers.1.mlp.experts.gate_up_proj"][expert], both)
    convert("import", "--hf", tmp_path / "fused", "--save", tmp_path / "again")
    convert("export", "--load", tmp_path / "again", "--hf", tmp_path / "out")
    assert_equal_tensors(read_all(tmp_path / "out"), weights)


def test_native_checkpoint_holds_the_weights_and_zero_padding(tmp_path: Path) -> None:
    source, weights = make_hf(tmp_path / "hf", "olmoe", "per-expert")
    convert("import", "--hf", source, "--save", tmp_path / "run")
    found = find_checkpoint(tmp_path / "run")
    assert found.iteration == 0
    with CheckpointReader(found.path) as reader:
        key = "embedding.word_embeddings.weight"
        assert reader.tensors[key].shape == (128, 48)
        table = reader.read(key, (0, 0), (128, 48))
        assert torch.equal(table[:120], weights["model.embed_tokens.weight"])
        assert torch.equal(table[120:], torch.zeros(8, 48, dtype=torch.bfloat16))
        for index, name in enumerate(("gate_proj", "up_proj")):
            block = reader.read(
                "decoder.layers.mlp.experts.weight1", (1, 2, index, 0, 0), (1, 1, 1, 20, 48)
            )
            expert = weights[f"model.layers.1.mlp.experts.2.{name}.weight"]
            assert torch.equal(block[0, 0, 0], expert)
    convert("export", "--load", tmp_path / "run", "--hf", tmp_path / "out")
    assert_equal_tensors(read_all(tmp_path / "out"), weights)


@pytest.mark.parametrize(
    ("stored", "flag", "written"),
    [
        (torch.bfloat16, "fp32", torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.float16, "fp32", torch.float32),
    ],
)
def test_dtype_converts_on_import_and_export(
    stored: torch.dtype, flag: str, written: torch.dtype, tmp_path: Path
) -> None:
    source, weights = make_hf(tmp_path / "hf", "olmoe", "per-expert", dtype=stored)
    expected = {name: tensor.to(written) for name, tensor in weights.items()}
    convert("import", "--hf", source, "--save", tmp_path / "one", "--dtype", flag)
    convert("export", "--load", tmp_path / "one", "--hf", tmp_path / "out")
    assert_equal_tensors(read_all(tmp_path / "out"), expected)
    config = (tmp_path / "one" / "iter_0000000" / "config.yaml").read_text()
    assert f"bf16: {str(written is torch.bfloat16).lower()}\n" in config
    if stored is torch.float16:
        return
    convert("import", "--hf", source, "--save", tmp_path / "two")
    convert("export", "--load", tmp_path / "two", "--hf", tmp_path / "out2", "--dtype", flag)
    assert_equal_tensors(read_all(tmp_path / "out2"), expected)


def test_checksums_report_the_digest_of_every_tensor(tmp_path: Path) -> None:
    source, weights = make_hf(tmp_path / "hf", "olmoe", "fused")
    convert("import", "--hf", source, "--save", tmp_path / "run", "--checksums")
    out = tmp_path / "out"
    exporting = ("export", "--load", tmp_path / "run", "--hf", out, "--layout", "fused")
    convert(*exporting, "--checksums")
    expected = {
        name: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in weights.items()
    }
    for directory, command in ((tmp_path / "run", "import"), (out, "export")):
        report = json.loads((directory / "conversion_report.json").read_text())
        assert report["sha256"] == expected
        assert report["num_tensors"] == len(expected)
        assert report["num_bytes"] == sum(tensor.nbytes for tensor in weights.values())
        assert (report["command"], report["family"]) == (command, "olmoe")
        assert (report["layout"], report["dtype"]) == ("fused", "bfloat16")


def word_tokenizer(path: Path) -> None:
    Tokenizer(WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a")).save(str(path))


def test_tokenizer_files_survive_the_round_trip(tmp_path: Path) -> None:
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert")
    word_tokenizer(source / "tokenizer.json")
    (source / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (source / "generation_config.json").write_text('{"eos_token_id": 3}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    convert("import", "--hf", source, "--save", tmp_path / "run")
    path = find_checkpoint(tmp_path / "run").path
    config = (path / "config.yaml").read_text()
    assert "tokenizer_type: HFTokenizer\n" in config
    assert f"tokenizer_model: {path / 'tokenizer.json'}\n" in config
    convert("export", "--load", tmp_path / "run", "--hf", tmp_path / "out")
    carried = sorted(
        name for name in os.listdir(source) if name not in {"config.json", "model.safetensors"}
    )
    assert carried.pop(carried.index("modeling_evil.py"))
    assert len(carried) == 4
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    own = {"config.json", "conversion_report.json", "model.safetensors"}
    assert set(os.listdir(tmp_path / "out")) == {*carried, *own}


def test_like_adds_tokenizer_and_ids_to_a_checkpoint_without_them(tmp_path: Path) -> None:
    """Cover training from an import, which drops hf_config.json and tokenizer_config.json."""
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert")
    convert("import", "--hf", source, "--save", tmp_path / "run")
    word_tokenizer(source / "tokenizer.json")
    (source / "config.json").write_text(
        json.dumps({**json.loads((source / "config.json").read_text()), "eos_token_id": 77})
    )
    exporting = ("export", "--load", tmp_path / "run", "--hf", tmp_path / "out")
    assert convert(*exporting, "--like", source) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 77
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("named", [{}, {"tokenizer_config": {"eos_token": "</s>", "x": 1}}])
def test_export_names_the_end_of_the_runs_own_tokenizer(
    named: dict[str, Any], tmp_path: Path
) -> None:
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert", vocab_size=300)
    cfg = PretrainConfig(
        model=FAMILIES["olmoe"].model_config(json.loads((source / "config.json").read_text())),
        data=DataConfig(
            tokenizer_type="HFTokenizer",
            tokenizer_model="data/tokenizer.json",
            eod_token=None if named else "</s>",
        ),
    )
    make_hf_tokenizer(tmp_path / "run", ["<unk>", "<s>", "</s>"], **named)
    # What another tokenizer leaves of an import: the model's config without ids.
    for imported in ({}, {"hf_config": {"max_position_embeddings": 64}}):
        write_json(tmp_path / "run", **imported)
        files = hf_files(FAMILIES["olmoe"], cfg, tmp_path / "run", like=None, dtype="float32").files
        assert json.loads(files["config.json"])["eos_token_id"] == 2
    write_json(tmp_path / "run", hf_config={"eos_token_id": None})
    kept = hf_files(FAMILIES["olmoe"], cfg, tmp_path / "run", like=None, dtype="float32").files
    assert json.loads(kept["config.json"])["eos_token_id"] is None
    (tmp_path / "run" / "hf_config.json").unlink()
    files = hf_files(FAMILIES["olmoe"], cfg, tmp_path / "run", like=None, dtype="float32").files
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["eos_token"] == "</s>"
    assert not named or settings.items() >= named["tokenizer_config"].items()


def test_run_on_mock_data_is_exported_without_its_configured_tokenizer(
    tmp_path: Path,
) -> None:
    """Cover training from an import, whose config names a tokenizer that mock data never saved."""
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert")
    config = json.loads((source / "config.json").read_text())
    cfg = PretrainConfig(
        model=FAMILIES["olmoe"].model_config(config),
        data=DataConfig(mock_data=True, tokenizer_model="run/tokenizer.json"),
    )
    files = hf_files(FAMILIES["olmoe"], cfg, tmp_path, like=None, dtype="float32").files
    assert files.keys() == {"config.json"}
    assert json.loads(files["config.json"])["eos_token_id"] is None


def test_hub_snapshot_of_symlinks_is_imported(tmp_path: Path) -> None:
    source, weights = make_hf(tmp_path / "hf", "olmoe", "per-expert")
    word_tokenizer(source / "tokenizer.json")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert convert("import", "--hf", snapshot, "--save", tmp_path / "run") == 0
    assert not (find_checkpoint(tmp_path / "run").path / "tokenizer.json").is_symlink()
    convert("export", "--load", tmp_path / "run", "--hf", tmp_path / "out")
    assert_equal_tensors(read_all(tmp_path / "out"), weights)


def test_checkpoint_saved_by_transformers_survives_the_round_trip(tmp_path: Path) -> None:
    """Use what save_pretrained really writes."""
    from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(1)
    like, _ = make_hf(tmp_path / "like", "olmoe", "fused")
    config = OlmoeConfig(**json.loads((like / "config.json").read_text()))
    model = OlmoeForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "hf")
    assert convert("import", "--hf", tmp_path / "hf", "--save", tmp_path / "run") == 0
    for form in ("per-expert", "fused"):
        out = tmp_path / form
        convert("export", "--load", tmp_path / "run", "--hf", out, "--layout", form)
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
        assert_equal_tensors(dict(loaded.state_dict()), dict(model.state_dict()))
    assert_equal_tensors(read_all(tmp_path / "per-expert"), read_all(tmp_path / "hf"))


def test_random_weights_differ_between_tensors() -> None:
    weights = hf_weights("olmoe", "per-expert", torch.float32, {})
    first = [tensor.flatten()[0].item() for tensor in weights.values()]
    assert len(set(first)) == len(first) > 50
