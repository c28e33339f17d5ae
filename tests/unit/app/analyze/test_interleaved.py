"""A model whose first layer is dense: its routers are found by their layer's number."""

import json
from pathlib import Path

import pytest
import torch

from megatron.trainer.checkpoint import CheckpointReader
from megatron.trainer.errors import CheckpointError, ConfigError
from moe_app.analyze.measure_weights import KEYS, NativeWeights
from moe_app.analyze.steps import _history
from moe_app.pretrain import command
from moe_app.pretrain.router_saturation import as_record
from tests.distributed.launcher import flags

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.utils._device._device_constructors()
    run = tmp_path_factory.mktemp("interleaved") / "run"
    sizes = {"num_layers": 2, "moe_layer_freq": 2, "ffn_hidden_size": 40, "train_iters": 1}
    assert command.main(flags(**sizes, device="cpu", save=run)) == 0
    return run


def test_weights_are_read_of_the_layer_that_has_them(run: Path) -> None:
    checkpoint = run / "iter_0000001"
    with CheckpointReader(checkpoint) as reader, NativeWeights(checkpoint) as weights:
        for key in KEYS["moe"].values():
            name = key.replace("layers.", "layers.1.")
            shape = reader.tensors[name].shape
            expected = reader.read(name, (0,) * len(shape), shape)
            assert torch.equal(weights.read(key, 1), expected)
        with pytest.raises(CheckpointError, match=r"has no decoder\.layers\.mlp\.router\.weight"):
            weights.read(KEYS["moe"]["router"], 0)


def test_history_is_of_the_first_layer_with_experts(run: Path) -> None:
    (record,) = map(json.loads, (run / "expert_load.jsonl").read_text().splitlines())
    assert record["load"][0] == [None] * 6 and sum(record["load"][1]) == pytest.approx(6, abs=1e-3)
    (figure,) = _history(run, None)
    assert "in layer 1 during training" in figure.title
    with pytest.raises(ConfigError, match=r"has no record of layer 0: it has layers 1; --run"):
        _history(run, 0)


def test_saturation_is_recorded_at_the_layers_place() -> None:
    found = {("moe", 1): (0.5, 0.25), ("moa", 0): (1.0, 0.0), ("moa", 1): (0.75, 0.5)}
    assert as_record(found, num_layers=2) == {
        "saturation": [None, 0.5],
        "saturation_first": [None, 0.25],
        "moa_saturation": [1.0, 0.75],
        "moa_saturation_first": [0.0, 0.5],
    }
