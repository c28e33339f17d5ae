"""Compare logits of native models sharded over ranks with those of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.hf_models import random_model, random_tokens
from tests.distributed.launcher import HERE, ranks

# Sizes divide by 2 for PP, TP and EP and are odd otherwise. JetMoE's embeddings are tied.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {"num_hidden_layers": 4}),
    "jetmoe": ("jetmoe", {"num_hidden_layers": 4}),
}
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
ETP1 = ["--expert-tensor-parallel-size", "1"]
LAYOUTS: dict[int, dict[str, list[str]]] = {
    2: {"tp2": TP2, "pp2": PP2, "ep2": EP2},
    4: {"tp2_ep2": [*TP2, *EP2, *ETP1], "tp2_ep2_etp2": [*TP2, *EP2]},
}
CASES = [f"{model} {layout}" for n in LAYOUTS for model in MODELS for layout in LAYOUTS[n]]
LENGTHS = (1, 17, 128)

# fp32 logits of a few units; sums over ranks round once more than sums within one.
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Return the ranks' logits by case and length, and transformers' own under the model's name."""
    out: Path = tmp_path_factory.mktemp("hf_parity")
    found: dict[str, dict[str, Tensor]] = {}
    for name, (family, changes) in MODELS.items():
        reference = random_model(family, **changes)
        tokens = {n: random_tokens(reference.config, batch=2, length=n) for n in LENGTHS}
        with torch.no_grad():
            found[name] = {
                str(n): reference(batch, use_cache=False).logits for n, batch in tokens.items()
            }
        given = {
            "config": reference.config.to_diff_dict(),
            "weights": dict(reference.state_dict()),
            "tokens": tokens,
        }
        torch.save(given, out / f"{name}.hf.pt")
    for num_ranks, layouts in LAYOUTS.items():
        cases = [
            {"name": f"{model} {layout}", "model": model, "flags": flags}
            for model in MODELS
            for layout, flags in layouts.items()
        ]
        file = out / f"cases{num_ranks}.json"
        file.write_text(json.dumps(cases))
        done = ranks(num_ranks, HERE / "hf_parity_worker.py", str(file), str(out))
        assert done.returncode == 0, done.stderr[-6000:]
        for case in cases:
            found[str(case["name"])] = torch.load(out / f"{case['name']}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("case", CASES)
def test_sharded_model_matches_logits_of_transformers(
    case: str, logits: dict[str, dict[str, Tensor]]
) -> None:
    expected = logits[case.split()[0]]
    assert logits[case].keys() == {"inferred 1", "inferred 17", "inferred 128", "trained 128"}
    for name, found in logits[case].items():
        truth = expected[name.split()[1]]
        assert truth.std() > 0.5
        torch.testing.assert_close(found, truth, rtol=0, atol=TOLERANCE, msg=f"{case} {name}")
