"""Flags of the measures, what a report lacks, and layers of very many experts."""

import itertools
import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from moe_app.analyze import measure_weights, steps
from moe_app.analyze.collection import Collection
from moe_app.analyze.manifest import NAME
from moe_app.analyze.measure_words import measure_vocabulary
from moe_app.analyze.measures import Measured
from moe_app.analyze.routing_figures import _flow_figure
from moe_app.analyze.tables import Table, joined, write_tables
from moe_app.cli import analyze_routing
from moe_ext.analysis.coactivation import JointCounts
from tests.unit.app.analyze.routing_samples import routers, write_collection

MEASURES = ("saturation", "coactivation", "domains", "vocabulary", "load", "similarity", "report")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_collection(tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "draw_static", lambda directory, figures: None)
    monkeypatch.setattr("moe_app.analyze.routing_report.draw_static", lambda directory, each: None)


def run(place: Path, step: str, *flags: str) -> int:
    return analyze_routing(
        [step, "--input", str(place), "--output", str(place.parent / "out"), *flags]
    )


class Random:
    """Stands for the weights of a checkpoint."""

    def __enter__(self) -> "Random":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, key: str, layer: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(layer + len(key))
        return torch.randn(6, 5, generator=generator)


def give_weights(place: Path, monkeypatch: pytest.MonkeyPatch, *, content: str) -> Path:
    """Make a checkpoint of a manifest alone, whose other files are never read."""
    weights = place.parent / "iter_0000005"
    weights.mkdir()
    (weights / "manifest.json").write_text(content)
    monkeypatch.setattr(measure_weights, "NativeWeights", lambda path: Random())
    return weights


def name_weights(place: Path, weights: Path, digest: str) -> None:
    values = json.loads((place / NAME).read_text())
    values.update(source=str(weights), model_hash=digest)
    (place / NAME).write_text(json.dumps(values))


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_similarity_is_of_the_collections_own_weights(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any
) -> None:
    weights = give_weights(place, monkeypatch, content="")
    name_weights(place, weights, EMPTY)
    assert run(place, "similarity") == 0
    # The run went on, or started again, under the same name.
    (weights / "manifest.json").write_text("{}")
    for flags in ((), ("--weights", str(weights))):
        assert run(place, "similarity", *flags) == 2
        assert "has other weights (44136fa355b3...) than the routing" in capsys.readouterr().err
    (weights / "manifest.json").unlink()
    assert run(place, "similarity") == 2
    assert "cannot be read as the checkpoint of" in capsys.readouterr().err
    # Another format has another hash, whatever the weights.
    monkeypatch.setattr(measure_weights, "HFWeights", lambda path: Random())
    (weights / "config.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert run(place, "similarity") == 0
    assert "that its weights are the same is not checked" in caplog.text


def test_a_report_without_weights_has_the_rest(place: Path, capsys: Any) -> None:
    assert run(place, "report") == 0
    said = capsys.readouterr().out
    assert "similarity: not measured: runs/gone/iter_0000005, which the routing was" in said
    out = place.parent / "out"
    page = (out / "report.html").read_text("utf-8")
    similarity = page.partition("<h2>Similarity</h2>")[2]
    assert "Not measured: runs/gone/iter_0000005, which the routing was collected" in similarity
    assert not (out / "similarity.csv").exists()
    # How the two kinds of router depend on each other is in the collection.
    assert "Attention against feed-forward routing" in similarity
    assert {"similarity_routers.csv", "load.csv", "domains.csv"} <= {p.name for p in out.iterdir()}
    saturation = page.partition("<h2>Router saturation</h2>")[2].partition("<h2>")[0]
    assert "Not measured: it compares checkpoints of a run, and one is given" in saturation
    # Weights that were asked for are needed.
    assert run(place, "report", "--weights", "runs/gone") == 2
    assert "runs/gone, which the routing" in capsys.readouterr().err
    assert run(place, "similarity") == 2


@pytest.mark.parametrize(
    ("step", "flags", "message"),
    [
        ("vocabulary", ("--experts", "0", "6"), "names expert 6, but a layer of .* has 6"),
        ("report", ("--experts", "6"), "give numbers from 0 to 5"),
        ("vocabulary", ("--experts", "-1"), "'-1' must be an integer of at least 0|expected"),
        ("load", ("--run", "RUN", "--history-layer", "2"), "no record of layer 2: it has layers"),
        ("load", ("--run", "RUN", "--history-layer", "-1"), "must be an integer of at|expected"),
        ("load", ("--run", "EMPTY"), "no record of layer 0: it has none of any layer"),
        ("load", ("--history-layer", "0"), "name the run's --save directory with --run"),
        ("coactivation", ("--strongest", "0"), "'0' must be an integer of at least 1"),
        ("vocabulary", ("--min-count", "0"), "'0' must be an integer of at least 1"),
    ],
)
def test_flags_out_of_range_are_refused(
    step: str, flags: tuple[str, ...], message: str, place: Path, capsys: Any
) -> None:
    record = {"iteration": 1, "load": [[1.0, 1.0], [0.5, 1.5]]}
    for name, lines in (("RUN", json.dumps(record) + "\n"), ("EMPTY", "")):
        (place.parent / name).mkdir()
        (place.parent / name / "expert_load.jsonl").write_text(lines)
    given = [str(place.parent / flag) if flag in ("RUN", "EMPTY") else flag for flag in flags]
    try:
        assert run(place, step, *given) == 2
    except SystemExit as end:
        assert end.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_flags_in_range_choose(place: Path) -> None:
    measured = measure_vocabulary(Collection(place), experts=[5, 1, 5])
    rows = measured.table("vocabulary_histogram").rows(kind="moe", domain="code")
    assert [row["expert"] for row in rows][::20] == [5, 1]
    assert len(rows) == 40


@pytest.mark.parametrize("step", MEASURES)
def test_a_run_is_no_collection(step: str, tmp_path: Path, capsys: Any) -> None:
    """Of a model without experts there is no collection, so no step can be given one."""
    (tmp_path / "in").mkdir()
    assert run(tmp_path / "in", step) == 2
    assert "an input is a directory that `analyze_routing.py collect`" in capsys.readouterr().err
    write_collection(tmp_path / "none")
    values = json.loads((tmp_path / "none" / NAME).read_text())
    (tmp_path / "in" / NAME).write_text(json.dumps({**values, "routers": []}))
    assert run(tmp_path / "in", step) == 2
    assert "it must name at least one router" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["saturation", "report"])
def test_a_series_of_two_architectures_is_refused(step: str, place: Path, capsys: Any) -> None:
    write_collection(place.parent / "other", iteration=1, routers=routers(5, 2))
    given = ["--input", str(place.parent / "other"), str(place)]
    assert analyze_routing([step, *given, "--output", str(place.parent / "out")]) == 2
    assert "routers moe 2 layers of 5 experts, k 2" in capsys.readouterr().err
    assert not list(place.parent.glob("out/*"))


def test_hundreds_of_experts_are_counted_and_drawn(tmp_path: Path) -> None:
    experts, topk = 512, 8
    truth = write_collection(tmp_path / "in", routers=routers(experts, topk)[1::2])
    for step in ("coactivation", "vocabulary"):
        assert run(tmp_path / "in", step) == 0
    table = pq.read_table(tmp_path / "out" / "coactivation.parquet")
    assert table.schema.field("kind").type == "string"
    assert len(table) == 2 * experts * (experts - 1)
    layer = table.slice(experts * (experts - 1), experts * (experts - 1))  # of the second
    found = np.full((experts, experts), np.nan)
    found[layer["i"].to_numpy(), layer["j"].to_numpy()] = layer["value"].to_numpy()
    rows = truth.experts["moe", 1]
    for i in {expert for row in rows[:5] for expert in row}:
        mine = [row for row in rows if i in row]
        expected = [sum(j in row for row in mine) / len(mine) for j in range(experts)]
        assert found[i].tolist() == pytest.approx(
            [*expected[:i], np.nan, *expected[i + 1 :]], nan_ok=True
        )


def test_as_many_boxes_as_can_be_told_apart() -> None:
    three = routers(512, 8, layers=3)[1::2]
    generator = np.random.default_rng(1)
    chosen = generator.integers(0, 100, size=(3, 4000, 1))  # each far above 1 / 512
    flows = {pair: JointCounts(512, 512) for pair in itertools.pairwise(three)}
    for (one, other), joint in flows.items():
        joint.add(chosen[one.layer], chosen[other.layer])
    flow = _flow_figure(Measured(tables=[], notes={"flows": flows}), "moe", three)
    columns = [node.column for node in flow.nodes]
    assert [columns.count(column) for column in range(3)] == [25] * 3  # the others are one
    assert sum(value for source, _, value in flow.links if columns[source] == 0) == 4000
    counts = Counter(chosen[0].ravel().tolist())
    largest = sorted(counts, key=lambda expert: (-counts[expert], expert))[:24]
    names = [node.name for node in flow.nodes if node.column == 0]
    assert names == [*(f"expert {expert}" for expert in largest), "other"]


def test_tables_are_joined_without_a_copy(tmp_path: Path) -> None:
    columns = [
        {"kind": np.repeat(kind, 3), "i": np.arange(3) + 10 * number, "value": np.zeros(3) + number}
        for number, kind in enumerate(("moe", "moa"))
    ]
    parts = [Table(name="x", columns=each) for each in columns]
    whole = joined("x", parts)
    assert len(whole) == 6
    chunks = whole.columns["value"].chunks
    assert [
        np.shares_memory(chunk.to_numpy(), part["value"])
        for chunk, part in zip(chunks, columns, strict=True)
    ] == [True, True]
    assert whole.rows(kind="moa") == [{"kind": "moa", "i": 10 + n, "value": 1.0} for n in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_app.analyze.tables._BLOCK_ROWS", 4)
        write_tables(tmp_path, [whole])
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert lines == [
        "kind,i,value",
        *(f"moe,{n},0.0" for n in range(3)),
        *(f"moa,{10 + n},1.0" for n in range(3)),
    ]
    assert pq.read_table(tmp_path / "x.parquet").to_pylist() == whole.rows()
