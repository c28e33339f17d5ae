"""Compare the converter's names, shapes and transforms with models and files of both sides."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.convert import FAMILIES, ExpertLayout, family_for_model, family_from_config
from moe_ext.layers.transformer import transformer_config
from moe_ext.presets import PRESETS
from tests.distributed.hf_models import fill, random_model, shards, to_hf, to_native

CASES: dict[str, tuple[str, ExpertLayout, dict[str, Any]]] = {
    "olmoe per-expert": ("olmoe", "per-expert", {}),
    "olmoe fused": ("olmoe", "fused", {}),
    "olmoe tied": ("olmoe", "per-expert", {"tie_word_embeddings": True}),
    "jetmoe": ("jetmoe", "fused", {}),
    "olmo": ("olmo", "dense", {}),
    "olmo tied": ("olmo", "dense", {"tie_word_embeddings": True}),
    "jetmoe untied": ("jetmoe", "fused", {"tie_word_embeddings": False}),
}


def described(family: str, reference: PreTrainedModel, **changes: Any) -> MoEModelConfig:
    return FAMILIES[family].model_config(reference.config.to_diff_dict(), **changes)


def in_memory(family: str) -> ExpertLayout:
    return FAMILIES[family].layouts[-1]


def saved(reference: PreTrainedModel, layout: ExpertLayout, path: Path) -> dict[str, Tensor]:
    """Return the tensors that transformers itself writes to disk."""
    reference.save_pretrained(path, save_original_format=layout == "per-expert")
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_match_what_transformers_writes(case: str, tmp_path: Path) -> None:
    family, layout, changes = CASES[case]
    reference = random_model(family, **changes)
    on_disk = saved(reference, layout, tmp_path)
    model = described(family, reference)
    expected = {name: tuple(tensor.shape) for name, tensor in on_disk.items()}
    assert FAMILIES[family].hf_tensors(model, layout) == expected
    assert FAMILIES[family].detect_layout(on_disk.keys()) == layout


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_weight_survives_the_round_trip(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    family, layout, changes = CASES[case]
    reference = random_model(family, **changes)
    nn.Module.to(reference, dtype)
    on_disk = saved(reference, layout, tmp_path)
    model = described(family, reference, make_vocab_size_divisible_by=128)
    native = to_native(family, model, layout, on_disk)
    back = to_hf(family, model, layout, native)
    assert back.keys() == on_disk.keys()
    for name, tensor in on_disk.items():
        assert torch.equal(back[name], tensor.float()), name


@pytest.mark.parametrize("case", CASES)
def test_native_names_and_shapes_match_a_built_model(
    case: str, single_rank: ProcessGroupCollection
) -> None:
    family, _, changes = CASES[case]
    reference = random_model(family, **changes)
    model = described(family, reference, make_vocab_size_divisible_by=128)
    chunks = build_model(
        model,
        transformer_config(model, bf16=False),
        pg_collection=single_rank,
        seq_length=16,
        seed=None,
    ).chunks
    expected = {shard.key: tuple(shard.global_shape) for shard in shards(chunks)}
    assert FAMILIES[family].native_tensors(model) == expected
    assert expected["embedding.word_embeddings.weight"][0] == 128 > model.vocab_size
    fill(chunks, to_native(family, model, in_memory(family), reference.state_dict()))


@pytest.mark.parametrize("layout", FAMILIES["olmoe"].layouts)
def test_both_layouts_give_the_same_native_tensors(layout: ExpertLayout, tmp_path: Path) -> None:
    reference = random_model("olmoe")
    model = described("olmoe", reference)
    on_disk = saved(reference, layout, tmp_path)
    expected = to_native("olmoe", model, "fused", reference.state_dict())
    for key, tensor in to_native("olmoe", model, layout, on_disk).items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("case", ["olmoe per-expert", "olmoe fused", "jetmoe", "olmo"])
def test_transformers_loads_exported_tensors(case: str, tmp_path: Path) -> None:
    family, layout, changes = CASES[case]
    reference = random_model(family, **changes)
    model = described(family, reference)
    native = to_native(family, model, in_memory(family), reference.state_dict())
    save_file(to_hf(family, model, layout, native), tmp_path / "model.safetensors")
    reference.config.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_padding_rows_are_zero_and_not_exported() -> None:
    reference = random_model("olmoe")
    model = described("olmoe", reference, make_vocab_size_divisible_by=32)
    assert (model.vocab_size, model.padded_vocab_size) == (120, 128)
    native = to_native("olmoe", model, "fused", reference.state_dict())
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert torch.count_nonzero(native[key][120:]) == 0
        native[key][120:] = 7.0
    back = to_hf("olmoe", model, "fused", native)
    assert torch.equal(back["lm_head.weight"], reference.state_dict()["lm_head.weight"])


def test_vocabulary_is_padded_to_the_requested_multiple() -> None:
    for vocab_size, divisor, rows in (
        (50304, 128, 50304),
        (32000, 128, 32000),
        (120, 128, 128),
        (50257, 1, 50257),
    ):
        config = {"model_type": "olmoe", "vocab_size": vocab_size}
        model = family_from_config(config).model_config(
            config, make_vocab_size_divisible_by=divisor
        )
        assert model.padded_vocab_size == rows
        assert family_from_config(config).model_config(config).make_vocab_size_divisible_by == 128


# arXiv 2409.02060 and 2404.07413, counted by transformers on the meta device.
@pytest.mark.parametrize(
    ("preset", "layout", "num_tensors", "num_parameters"),
    [
        ("olmoe_1b_7b", "per-expert", 3219, 6_919_161_856),
        ("olmoe_1b_7b", "fused", 179, 6_919_161_856),
        ("jetmoe_8b", "fused", 266, 8_522_237_952),
    ],
)
def test_published_models_convert_in_small_pieces(
    preset: str, layout: ExpertLayout, num_tensors: int, num_parameters: int
) -> None:
    model = MoEModelConfig(**PRESETS[preset])
    family = family_for_model(model)
    shapes = family.hf_tensors(model, layout)
    assert len(shapes) == num_tensors
    assert sum(math.prod(shape) for shape in shapes.values()) == num_parameters
    sizes = [math.prod(piece.block) for piece in family.pieces(model, layout)]
    assert sum(sizes) == sum(math.prod(s) for s in family.native_tensors(model).values())
    assert max(sizes) <= 24_000_000  # 100 MB in fp32
    # A writer can append without seeking back.
    parts = [part for piece in family.pieces(model, layout) for part in piece.sources]
    order = list(shapes)
    places = [(order.index(part.name), part.start) for part in parts]
    assert places == sorted(places)


def test_unknown_layout_is_refused() -> None:
    model = described("jetmoe", random_model("jetmoe"))
    message = "jetmoe checkpoints have no layout 'per-expert'; use fused"
    with pytest.raises(ValueError, match=re.escape(message)):
        FAMILIES["jetmoe"].pieces(model, "per-expert")
