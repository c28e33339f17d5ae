"""Compare the tables of every step with their definitions, in plain Python over all tokens."""

import csv
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from moe_app.analyze import routing_report, steps
from moe_app.cli import analyze_routing
from tests.unit.app.analyze.routing_samples import DOMAINS, Truth, routers, write_collection

ROUTERS = [("moe", 0), ("moe", 1), ("moa", 0), ("moa", 1)]
EXPERTS, TOPK = 6, 2


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    directory = tmp_path_factory.mktemp("routing") / "last"
    return directory, write_collection(directory)


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Draw files only where they are looked at."""
    if "page" not in request.node.name:
        monkeypatch.setattr(steps, "draw_static", lambda directory, figures: None)


def run(step: str, output: Path, *inputs: Path, flags: tuple[str, ...] = ()) -> None:
    given = [step, "--input", *map(str, inputs), "--output", str(output), *flags]
    assert analyze_routing(given) == 0


def table(output: Path, name: str) -> list[dict[str, Any]]:
    """Read a CSV with numbers as numbers, and compare it with the Parquet beside it."""
    with (output / f"{name}.csv").open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    beside = pq.read_table(output / f"{name}.parquet").to_pylist()
    assert len(rows) == len(beside)
    for row, other in zip(rows, beside, strict=True):
        assert list(row) == list(other)
        for key, value in other.items():
            assert row[key] == str(value)
            row[key] = value
    return rows


def values(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], Any]:
    """Return the last column by others."""
    last = list(rows[0])[-1]
    found = {tuple(row[key] for key in keys): row[last] for row in rows}
    assert len(found) == len(rows)
    return found


def close(found: dict[Any, float], expected: dict[Any, float]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9, nan_ok=True), key


def over(count: float, total: float) -> float:
    return count / total if total else math.nan


def firsts(rows: list[list[int]], k: int) -> list[list[int]]:
    return [row[:k] for row in rows]


def test_saturation(collected: tuple[Path, Truth], tmp_path: Path) -> None:
    last, final = collected
    earlier = {}
    for iteration in (1, 3):
        place = tmp_path / str(iteration)
        earlier[iteration] = write_collection(place, seed=iteration + 10, iteration=iteration)
    run("saturation", tmp_path / "out", tmp_path / "3", last, tmp_path / "1")
    expected = {}
    for (kind, layer), iteration, k in itertools.product(ROUTERS, earlier, (1, TOPK)):
        pairs = list(
            zip(
                firsts(earlier[iteration].experts[kind, layer], k),
                firsts(final.experts[kind, layer], k),
                strict=True,
            )
        )
        same = sum(len(set(a) & set(b)) for a, b in pairs)
        expected[kind, layer, k, iteration] = same / (k * len(pairs))
    rows = table(tmp_path / "out", "saturation")
    assert list(rows[0]) == ["kind", "layer", "k", "iteration", "saturation"]
    close(values(rows, "kind", "layer", "k", "iteration"), expected)
    levels = values(table(tmp_path / "out", "saturation_random"), "kind", "k")
    assert levels["moe", 1] == pytest.approx(1 / 6) and levels["moa", 2] == pytest.approx(1 / 3)
    checkpoints = table(tmp_path / "out", "checkpoints")
    assert [(row["iteration"], row["consumed_tokens"]) for row in checkpoints] == [
        *((iteration, 5000) for iteration in (1, 3, 5)),
    ]


def test_coactivation(collected: tuple[Path, Truth], tmp_path: Path) -> None:
    directory, truth = collected
    run("coactivation", tmp_path, directory, flags=("--strongest", "3"))
    exact, adjacent = {}, {}
    for (kind, layer), i, j in itertools.product(ROUTERS, range(EXPERTS), range(EXPERTS)):
        rows = [row for row in truth.experts[kind, layer] if i in row]
        if i != j:
            both = sum(j in row for row in rows)
            exact[kind, layer, i, j] = over(both, len(rows))
            neighbours = sum({i, j} == {a, b} for row in rows for a, b in itertools.pairwise(row))
            adjacent[kind, layer, i, j] = over(neighbours, len(rows))
    found = table(tmp_path, "coactivation")
    assert list(found[0]) == ["kind", "layer", "i", "j", "value"]
    assert any(math.isnan(value) for value in exact.values())  # an expert without a token
    close(values(found, "kind", "layer", "i", "j"), exact)
    close(values(table(tmp_path, "coactivation_adjacent"), "kind", "layer", "i", "j"), adjacent)
    order = [row for row in table(tmp_path, "coactivation_order") if row["kind"] == "moe"]
    assert len(order) == 6 and {row["cluster"] for row in order} == {0, 1, 2}


def test_domains(collected: tuple[Path, Truth], tmp_path: Path) -> None:
    directory, truth = collected
    run("domains", tmp_path, directory)
    expected = {}
    for (kind, layer), domain, k in itertools.product(ROUTERS, DOMAINS, (1, TOPK)):
        rows = [
            row
            for row, own in zip(firsts(truth.experts[kind, layer], k), truth.domains, strict=True)
            if own == domain
        ]
        for expert in range(EXPERTS):
            share = over(sum(expert in row for row in rows), len(rows))
            expected[kind, layer, expert, domain, k] = share
    found = table(tmp_path, "domains")
    assert list(found[0]) == ["kind", "layer", "expert", "domain", "k", "share"]
    close(values(found, "kind", "layer", "expert", "domain", "k"), expected)
    for row in table(tmp_path, "domains_deviation"):
        key = (row["kind"], row["layer"], row["domain"], row["k"])
        shares = [value for name, value in expected.items() if (*name[:2], *name[3:]) == key]
        mean = sum(shares) / EXPERTS
        deviation = math.sqrt(sum((share - mean) ** 2 for share in shares) / EXPERTS)
        assert row["standard_deviation"] == pytest.approx(deviation)
        above = sum(share > 1.5 * row["k"] / EXPERTS for share in shares)
        assert row["experts_above_1.5_uniform"] == above
    pairs = list(zip(truth.experts["moe", 0], truth.experts["moe", 1], strict=True))
    for row in table(tmp_path, "domains_flow"):
        if row["kind"] == "moe":
            ends = (row["from_expert"], row["to_expert"])
            assert row["tokens"] == sum((a[0], b[0]) == ends for a, b in pairs)


def own_tokens(truth: Truth, router: tuple[str, int], variant: str, k: int) -> Iterator[Any]:
    words = truth.words[variant]
    for token in range(11):
        rows = [
            row
            for row, word in zip(firsts(truth.experts[router], k), words, strict=True)
            if word == token
        ]
        yield token, rows


def test_vocabulary(collected: tuple[Path, Truth], tmp_path: Path) -> None:
    directory, truth = collected
    run("vocabulary", tmp_path, directory, flags=("--min-count", "9"))
    expected, best_means = {}, {}
    for (kind, layer), variant, k in itertools.product(ROUTERS, truth.words, (1, TOPK)):
        equation, released = [], []
        for _, rows in own_tokens(truth, (kind, layer), variant, k):
            counts = [sum(expert in row for row in rows) for expert in range(EXPERTS)]
            if rows:
                released.append(max(counts) / len(rows))
            if len(rows) >= 9:
                equation.append((counts.index(max(counts)), max(counts) / sum(counts)))
        shares = [share for _, share in equation]
        expected[kind, layer, k, variant] = sum(shares) / len(shares)
        expected[kind, layer, k, f"{variant}_released"] = sum(released) / len(released)
        for expert in range(EXPERTS):
            own = [share for best, share in equation if best == expert]
            best_means[kind, layer, k, variant, expert] = over(sum(own), len(own))
    rows = table(tmp_path, "vocabulary")
    assert list(rows[0]) == ["kind", "layer", "k", "variant", "mean"]
    close(values(rows, "kind", "layer", "k", "variant"), expected)
    found = {
        tuple(row[key] for key in ("kind", "layer", "k", "variant", "expert")): row["mean"]
        for row in table(tmp_path, "vocabulary_experts")
    }
    close(found, best_means)
    for row in table(tmp_path, "vocabulary_tokens"):
        tokens = dict(own_tokens(truth, (row["kind"], row["layer"]), row["variant"], 1))
        mine = tokens[row["token_id"]]
        assert row["occurrences"] == len(mine) >= 9 and row["token"] == str(row["token_id"])
        assert row["share"] == pytest.approx(sum(e == [row["expert"]] for e in mine) / len(mine))


def test_load(collected: tuple[Path, Truth], tmp_path: Path) -> None:
    directory, truth = collected
    run("load", tmp_path, directory)
    rows = table(tmp_path, "load")
    assert list(rows[0]) == [
        *("kind", "layer", "domain", "load_balancing_loss", "max_load_ratio", "entropy", "dead")
    ]
    assert {(row["kind"], row["layer"]) for row in rows} == set(ROUTERS)
    for row in rows:
        domain = row["domain"]
        mine = [
            (experts, scores)
            for experts, scores, own in zip(
                truth.experts[row["kind"], row["layer"]],
                truth.scores[row["kind"], row["layer"]],
                truth.domains,
                strict=True,
            )
            if domain in (own, "all")
        ]
        counts = [sum(e in experts for experts, _ in mine) for e in range(EXPERTS)]
        means = [sum(scores[e] for _, scores in mine) / len(mine) for e in range(EXPERTS)]
        shares = [count / sum(counts) for count in counts]
        loss = EXPERTS * sum(f * p for f, p in zip(shares, means, strict=True))
        assert row["load_balancing_loss"] == pytest.approx(loss)
        assert row["max_load_ratio"] == pytest.approx(max(counts) * EXPERTS / sum(counts))
        assert row["entropy"] == pytest.approx(-sum(f * math.log(f) for f in shares if f))
        assert row["dead"] == counts.count(0) >= 1
    scales = {
        (row["kind"], row["layer"], row["domain"]): row for row in table(tmp_path, "load_scales")
    }
    one = next(row for row in rows if (row["kind"], row["layer"], row["domain"]) == ROUTER_ROW)
    scale = scales["moe", "1", "docs"]
    assert scale["megablocks"] == one["load_balancing_loss"]
    assert scale["transformers"] == pytest.approx(TOPK * scale["megablocks"])
    assert scale["megablocks_per_window"] > scale["megablocks"]  # few tokens are never even
    assert set(scales) >= {("moe", "all", "docs"), ("moa", "all", "all")}


ROUTER_ROW = ("moe", 1, "docs")


def test_all_steps_make_a_page(collected: tuple[Path, Truth], tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    write_collection(earlier, seed=3, iteration=2)
    with pytest.MonkeyPatch.context() as patch:
        # Similarity needs weights, and has a test of its own.
        others = [step for step in routing_report.STEPS if step.name != "similarity"]
        patch.setattr(routing_report, "STEPS", others)
        run("report", tmp_path / "out", collected[0], earlier, flags=("--title", "A <b> title"))
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "<title>A &lt;b&gt; title</title>" in page and "<b> title" not in page
    assert page.count('<div class="figure"') >= 14
    assert "http://" not in page.partition("<script>")[0]
    for name in ("Router saturation", "Expert co-activation", "Domain spec", "Expert load"):
        assert f"<h2>{name}" in page
    assert "random router" in page
    for path in (tmp_path / "out").glob("*.svg"):
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in path.read_text("utf-8")
    figures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert figures == {path.stem for path in (tmp_path / "out").glob("*.svg")}
    assert {"saturation", "domains_flow_moa", "vocabulary_topk", "load_moa"} <= figures


@pytest.mark.parametrize(("experts", "topk"), [(1, 1), (4, 4)])
def test_every_token_of_an_expert_that_is_always_chosen(
    experts: int, topk: int, tmp_path: Path
) -> None:
    write_collection(tmp_path / "in", routers=routers(experts, topk, layers=1))
    for step in ("coactivation", "domains", "vocabulary", "load"):
        run(step, tmp_path / "out", tmp_path / "in")
    shares = table(tmp_path / "out", "domains")
    assert {row["share"] for row in shares if row["k"] == topk} == {1.0}
    together = table(tmp_path / "out", "coactivation")
    assert {row["value"] for row in together} == ({1.0} if experts > 1 else set())
