"""Compare the routing collected under every layout, and with transformers' router logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron.trainer.data.writer import TokenFileWriter
from moe_app.analyze import steps
from moe_app.analyze.manifest import Manifest, read_manifest
from moe_app.cli import analyze_routing
from moe_app.convert import convert_checkpoint
from moe_app.pretrain import command
from moe_ext.analysis.ordering import choices_of_outputs
from tests.distributed.jetmoe_cases import FAMILIES
from tests.distributed.launcher import HERE, TINY, flags, ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]

VOCAB, LENGTH = 120, 16
SMALL = ["--tokens-per-batch", "40", "--shard-tokens", "150"]
LAYOUTS = {
    "tp2": ["--tensor-model-parallel-size", "2"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
    "ep2": ["--expert-model-parallel-size", "2"],
    "dp2": [],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one step of each family, export it, and collect its routing in every way."""
    torch.utils._device._device_constructors()
    root = tmp_path_factory.mktemp("analyze")
    generator = torch.Generator().manual_seed(3)
    for name, count in (("code", 301), ("docs", 90)):
        with TokenFileWriter(str(root / name), vocab_size=VOCAB) as writer:
            writer.add_document(torch.randint(VOCAB, (count,), generator=generator).tolist())
            writer.finish()
    one, two = {}, {}
    data = ["--data-path", f"code={root / 'code'}", f"docs={root / 'docs'}"]
    for family, settings in FAMILIES.items():
        run = root / family
        training = flags(**settings, save=run, train_iters=1, init_method_std=0.1)
        assert command.main(training) == 0
        export = ["export", "--load", str(run), "--hf", f"{run}_exported", "--no-tokenizer"]
        assert convert_checkpoint.main(export) == 0
        native = ["--load", str(run), *data]
        hf = ["--hf", f"{run}_exported", *data, "--seq-length", str(LENGTH)]
        one[f"{family}_one"] = native
        one[f"{family}_small"] = [*native, *SMALL]
        one[f"{family}_hf"] = hf
        for layout, given in LAYOUTS.items():
            two[f"{family}_{layout}"] = [*native, *SMALL, *given]
        two[f"{family}_hf_tp2"] = [*hf, *LAYOUTS["tp2"]]
        two[f"{family}_hf_pp2_small"] = [*hf, *SMALL, *LAYOUTS["pp2"]]
        two[f"{family}_hf_ep2"] = [*hf, *LAYOUTS["ep2"]]
    dense = flags(save=root / "dense", train_iters=1, num_experts=None, ffn_hidden_size=40)
    assert command.main(dense) == 0
    for cases in (one, two):
        cases["dense"] = ["--load", str(root / "dense"), *data]
    for number, cases in ((1, one), (2, two)):
        file = root / f"cases{number}.json"
        outputs = {name: [*case, "--output", str(root / name)] for name, case in cases.items()}
        file.write_text(json.dumps(outputs))
        done = ranks(number, HERE / "worker_analyze.py", str(file), timeout=400)
        assert done.returncode == 0, done.stderr[-6000:]
        (root / f"said{number}").write_text(done.stdout)
    return root


def collected(directory: Path) -> tuple[Manifest, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return manifest, tokens and windows, the columns as plain pyarrow reads them."""
    tables = []
    for kind in ("tokens", "windows"):
        table = pq.read_table(sorted(directory.glob(f"{kind}-*.parquet")))
        columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
        tables.append(columns)
    return read_manifest(directory), tables[0], tables[1]


@pytest.fixture(scope="module")
def truth(runs: Path) -> dict[str, Any]:
    return {family: collected(runs / f"{family}_one") for family in FAMILIES}


CASES = ["small", *LAYOUTS, "hf", "hf_tp2", "hf_pp2_small", "hf_ep2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_routing_is_that_of_one_rank(
    family: str, case: str, runs: Path, truth: dict[str, Any]
) -> None:
    expected, tokens, windows = truth[family]
    manifest, found, found_windows = collected(runs / f"{family}_{case}")
    assert manifest.is_complete
    assert len(manifest.shards) == (3 if "small" in case or case in LAYOUTS else 1)
    assert manifest.routers == expected.routers and manifest.num_tokens == 391
    assert found.keys() == tokens.keys()
    for name, values in tokens.items():
        if name.endswith(".gates"):
            np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=name)
    for name, values in windows.items():
        np.testing.assert_allclose(found_windows[name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_is_that_of_transformers(family: str, runs: Path, truth: dict[str, Any]) -> None:
    manifest, tokens, windows = truth[family]
    directory = runs / f"{family}_exported"
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    if family == "olmoe":  # the default, a grouped GEMM, does not support odd widths
        config.experts_implementation = "eager"
    model = AutoModelForCausalLM.from_pretrained(directory, config=config, local_files_only=True)
    model.eval()
    outputs: dict[str, list[torch.Tensor]] = {router.name: [] for router in manifest.routers}
    predicted: list[int] = []
    ends = np.cumsum(windows["tokens"])
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        ids = torch.tensor(tokens["input"][start:end])[None]
        with torch.no_grad():
            done = model(ids, output_router_logits=True)
        predicted += done.logits[0].argmax(dim=-1).tolist()
        for router, values in zip(manifest.routers, done.router_logits, strict=True):
            outputs[router.name].append(values)
    assert predicted == tokens["predicted"].tolist()
    for router in manifest.routers:
        logits = torch.cat(outputs[router.name])
        # transformers 5.0 to 5.3 gave probabilities under the same name.
        for values in (logits, logits.softmax(dim=-1)):
            choices = choices_of_outputs(values, router.topk, renormalizes=family == "jetmoe")
            found = tokens[f"{router.name}.experts"]
            np.testing.assert_array_equal(choices.experts.numpy(), found)
            gates = tokens[f"{router.name}.gates"]
            np.testing.assert_allclose(choices.gates.numpy(), gates, rtol=0, atol=1e-5)
        sums = torch.stack([part.softmax(dim=-1).sum(dim=0) for part in outputs[router.name]])
        found = windows[f"{router.name}.scores"]
        np.testing.assert_allclose(sums.numpy(), found, rtol=0, atol=1e-3)
    kinds = {router.kind for router in manifest.routers}
    assert kinds == ({"moe"} if family == "olmoe" else {"moe", "moa"})


def test_a_model_without_experts_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "CheckpointError: the model has no experts: its feed-forward layers are dense"
    for number in (1, 2):
        assert (runs / f"said{number}").read_text().count(message) == number  # on every rank
    assert not (runs / "dense_out").exists()
    given = ["--load", str(runs / "dense"), "--data-path", f"a={runs / 'code'}"]
    assert analyze_routing(["collect", *given, "--output", str(runs / "dense_out")]) == 2
    assert message in capsys.readouterr().err
    (runs / "dense_hf").mkdir()
    (runs / "dense_hf" / "config.json").write_text('{"model_type": "llama"}')
    save_file({"model.norm.weight": torch.ones(4)}, runs / "dense_hf" / "model.safetensors")
    given = ["--hf", str(runs / "dense_hf"), *given[2:]]
    assert analyze_routing(["collect", *given, "--output", str(runs / "dense_out")]) == 2
    assert "model_type is 'llama'; it must be one of jetmoe, olmo, olmoe" in capsys.readouterr().err
    assert not (runs / "dense_out").exists()


def test_windows_are_consecutive_and_know_what_follows(runs: Path, truth: dict[str, Any]) -> None:
    manifest, tokens, windows = truth["olmoe"]
    for domain, (name, count) in enumerate((("code", 301), ("docs", 90))):
        text = np.fromfile(runs / f"{name}.bin", dtype=np.uint16).astype(int)
        mine = tokens["domain"] == domain
        np.testing.assert_array_equal(tokens["input"][mine], text)
        np.testing.assert_array_equal(tokens["next"][mine], [*text[1:], -1])
        lengths = windows["tokens"][windows["domain"] == domain].tolist()
        rest = [count % LENGTH] if count % LENGTH else []
        assert lengths == [LENGTH] * (count // LENGTH) + rest
    ends = np.cumsum(windows["tokens"])
    for router in manifest.routers:
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            chosen = tokens[f"{router.name}.experts"][start:end]
            counts = np.bincount(chosen.ravel(), minlength=router.num_experts)
            np.testing.assert_array_equal(counts, windows[f"{router.name}.counts"][number])


@pytest.mark.parametrize("family", FAMILIES)
def test_similarity_is_the_cosine_of_weights(family: str, runs: Path, tmp_path: Path) -> None:
    tables = {}
    for form in ("one", "hf"):
        given = ["--input", str(runs / f"{family}_{form}"), "--output", str(tmp_path / form)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "draw_static", lambda directory, figures: None)
            assert analyze_routing(["similarity", *given]) == 0
        tables[form] = pq.read_table(tmp_path / form / "similarity.parquet")
    native, hf = (table["cosine"].to_numpy() for table in tables.values())
    np.testing.assert_allclose(native, hf, rtol=0, atol=1e-6)
    weights: dict[str, torch.Tensor] = {}
    for file in (runs / f"{family}_exported").glob("*.safetensors"):
        weights |= load_file(file)
    middle = "gate.weight" if family == "olmoe" else "router.layer.weight"
    rows = tables["one"].to_pylist()
    mine = [row for row in rows if (row["kind"], row["weights"]) == ("moe", "router")]
    assert len(mine) == FAMILIES[family].get("num_layers", TINY["num-layers"]) * 15
    for row in mine:
        matrix = weights[f"model.layers.{row['layer']}.mlp.{middle}"].double()
        cosine = torch.cosine_similarity(matrix[row["i"]], matrix[row["j"]], dim=0)
        assert row["cosine"] == pytest.approx(float(cosine), abs=1e-6)
    cosines = [row["cosine"] for row in mine if row["layer"] == 0]
    summary = pq.read_table(tmp_path / "one" / "similarity_mean.parquet").to_pylist()
    first = next(row for row in summary if (row["kind"], row["weights"]) == ("moe", "router"))
    assert first["mean"] == pytest.approx(np.mean(cosines))
    assert first["highest"] == max(cosines)
    assert first["random_deviation"] == pytest.approx(48**-0.5)
    assert (tmp_path / "one" / "similarity_routers.csv").exists() == (family == "jetmoe")
