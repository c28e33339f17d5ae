"""The HTML page: its numbers are those of the run directory, and nothing in it is obeyed."""

import base64
import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.hooks.base import append_record, read_records
from moe_app.view import page_data, report_run
from tests.unit.app.view.report_samples import Page, make_page, make_run, step


def curve(run: dict[str, Any], chart: str, label: str) -> list[tuple[Any, Any, Any]]:
    (found,) = (c for c in run["curves"] if (c["chart"], c["label"]) == (chart, label))
    return list(zip(found["iteration"], found["tokens"], found["value"], strict=True))


def test_numbers_of_the_page_are_those_of_the_records(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    page = make_page(*folders)
    assert [run["name"] for run in page.data["runs"]] == ["a", "b"]
    for folder, run in zip(folders, page.data["runs"], strict=True):
        records = read_records(folder / "metrics.jsonl")
        steps = [record for record in records if "lm_loss" in record]
        for chart, label, key in (
            ("loss", "training", "lm_loss"),
            ("rate", "learning rate", "learning_rate"),
            ("norm", "gradient norm", "grad_norm"),
            ("speed", "speed", "tokens_per_second"),
            ("balance", "experts", "load_balancing_loss"),
            ("max_load", "experts", "moe_max_load_ratio"),
            ("dead", "experts", "moe_dead_experts"),
            ("straggler", "slowest rank", "straggler_ratio"),
        ):
            expected = [(r["iteration"], r["consumed_tokens"], r[key]) for r in steps]
            assert curve(run, chart, label) == expected
        for source in ("code", "docs"):
            assert [value for _, _, value in curve(run, "sources", source)] == [
                record["consumed_tokens_per_source"][source] for record in steps
            ]
            assert curve(run, "loss", f"validation: {source}") == [
                (record["iteration"], record["consumed_tokens"], record["valid_loss"][source])
                for record in records
                if "valid_loss" in record
            ]
        (slowest,) = (each for each in run["curves"] if each["chart"] == "straggler")
        assert slowest["rank"] == [record["straggler_rank"] for record in steps]
        (load,) = run["loads"]
        written = read_records(folder / "expert_load.jsonl")
        assert load["rows"] == [record["load"] for record in written]
        assert load["iteration"] == [record["iteration"] for record in written]
        assert load["tokens"] == [64 * record["iteration"] for record in written]
        for layers, key in zip(
            run["layers"], ("layer_max_load_ratio", "layer_dead_experts"), strict=True
        ):
            assert layers["columns"] == [record[key] for record in steps]
            assert layers["iteration"] == [record["iteration"] for record in steps]
        assert run["phases"] == [
            {"name": "stable", "iteration": 0, "tokens": 0},
            {"name": "anneal", "iteration": 120, "tokens": 64 * 120},
        ]
        events = read_records(folder / "events.jsonl")
        assert run["events"] == [{**event, "tokens": 64 * event["iteration"]} for event in events]


def test_summary_answers_what_a_reader_asks(tmp_path: Path) -> None:
    page = make_page(make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1))
    losses = [step(200, seed)["lm_loss"] for seed in (0, 1)]
    assert page.row("training loss") == [f"{loss:.4f}" for loss in losses]
    for question, answer in {
        "state": "ended: finished",
        "iterations": "200 of 200",
        "tokens": "12,800",
        "validation loss: code": "2.8000 (best 2.8000 at 200)",
        "validation loss: docs": "3.5000 (best 3.5000 at 100)",
        "median speed": "48 tokens/s",
        # 100 steps of 64 tokens at 32 tokens/s and 100 at 64.
        "training time": "5 min",
        "time from first to last event": "20 min",
        "interruptions": "1",
        "skipped steps": "1",
        "rewinds": "0",
        "dead experts": "1",
        "slowest rank": "2, in 70% of 20 records",
    }.items():
        assert page.row(question) == [answer, answer], question


def test_settings_that_differ_are_listed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", lr="0.001")]
    with (runs[1] / "config.yaml").open("a") as file:
        file.write("new: [x, 1]\n")
    page = make_page(*runs)
    differing = page.text.partition("<h2>Settings that differ</h2>")[2].partition("<details>")[0]
    assert Page(differing).rows == [
        ["", "a", "b"],
        ["lr", "0.0004", "0.001"],
        ["new", "not set", "[x, 1]"],
    ]
    assert page.row("seq_length") == ["16", "16"]
    alike = make_page(runs[0], make_run(tmp_path / "c"))
    assert "all runs have the same settings" in alike.text
    assert "Settings that differ" not in make_page(runs[0]).text


def test_events_are_listed_in_order(tmp_path: Path) -> None:
    page = make_page(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    events = page.text.partition("<h2>Events</h2>")[2].partition("<h2>")[0]
    rows = Page(events).rows
    assert rows[0] == ["time", "run", "iteration", "event", ""]
    assert [row[1] for row in rows[1:]] == ["a", "b"] * 5
    assert ["2026-01-01 00:11:00Z", "a", "110", "resume", "from iter_0000100"] in rows


def test_long_run_is_a_bounded_page_that_keeps_what_sticks_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    draw = random.Random(3)
    losses = [2.0 + draw.random() for _ in range(40_000)]
    losses[13_333], losses[27_777] = 50.0, 0.125
    with (run / "metrics.jsonl").open("w") as file:
        for number, loss in enumerate(losses, start=1):
            record = {"iteration": number, "consumed_tokens": 64 * number, "lm_loss": loss}
            file.write(f'{json.dumps(record)[:-1]}, "layer_max_load_ratio": [{loss}, 1.0]}}\n')
    with (run / "expert_load.jsonl").open("w") as file:
        for number in range(1, 101):
            file.write(json.dumps({"iteration": number, "load": [[1.0] * 64] * 64}) + "\n")
    with (run / "events.jsonl").open("w") as file:
        for number in range(1, 2001):
            name = "skip" if number % 100 == 0 else "save"
            file.write(json.dumps({"iteration": number, "event": name}) + "\n")
    page = make_page(run)
    assert len(page.text) < 1_500_000
    data = page.data["runs"][0]
    points = curve(data, "loss", "training")
    assert 900 < len(points) <= page_data.MAX_POINTS
    assert points[0][0] == 1 and points[-1][0] == 40_000
    assert {(13_334, 50.0), (27_778, 0.125)} <= {(at, value) for at, _, value in points}
    assert all(value == losses[at - 1] and tokens == 64 * at for at, tokens, value in points)
    columns = data["layers"][0]["columns"]
    assert len(columns) == page_data.MAX_COLUMNS
    assert max(column[0] for column in columns) == 50.0
    (load,) = data["loads"]
    assert load["records"] == 100 and len(load["rows"]) == 100_000 // 64**2
    assert (load["iteration"][0], load["iteration"][-1]) == (1, 100)
    events = data["events"]
    assert len(events) == page_data.MAX_EVENTS
    assert sum(event["event"] == "skip" for event in events) == 20
    assert events[-2]["event"] == "save" and events[-2]["iteration"] == 1999
    assert "1,600 older ones are left out" in page.text


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--\u2028"
TAGS = set(
    "html head meta title style body h1 h2 p div table thead tbody tr th td details summary"
    " noscript script".split()
)


def test_nothing_from_a_run_becomes_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / EVIL.replace("/", ""))
    quoted = json.dumps(EVIL)
    with (run / "config.yaml").open("a") as file:
        file.write(f"{quoted}: {quoted}\n")
    for iteration in (210, 220):
        record = {**step(iteration), "phase": EVIL}
        record["consumed_tokens_per_source"] = {EVIL: 1, "code": 2}
        append_record(run / "metrics.jsonl", record)
    append_record(run / "metrics.jsonl", {"iteration": 220, "valid_loss": {EVIL: 1.0}})
    event = {"iteration": 3, "event": EVIL, "time": EVIL, "detail": EVIL}
    append_record(run / "events.jsonl", event)
    (run / "ended.json").write_text(json.dumps({"reason": EVIL, "detail": EVIL}))
    page = make_page(run, make_run(tmp_path / "other"), output=tmp_path / "page.html")

    assert set(page.tags) == TAGS
    assert page.tags.count("script") == 2 and page.tags.count("style") == 1
    names = {name for name, _ in page.attributes}
    assert names == set("lang charset http-equiv content name id class scope open type".split())
    assert not set(page.contents["script"][0]) & set("<>&")
    # It is all there as text.
    assert page.contents["title"] == page.contents["h1"] == [f"{EVIL.replace('/', '')}, other"]
    assert page.row("state")[0] == f"ended: {EVIL}: {EVIL}"
    assert [EVIL, EVIL, "not set"] in page.rows
    data = page.data["runs"][0]
    assert data["name"] == EVIL.replace("/", "")
    assert data["phases"][-1]["name"] == EVIL and data["events"][-1]["detail"] == EVIL
    assert {EVIL, f"validation: {EVIL}"} <= {each["label"] for each in data["curves"]}


def test_page_loads_nothing_and_allows_only_its_own_script(tmp_path: Path) -> None:
    page = make_page(make_run(tmp_path / "a"))
    assert re.findall(r"\w+://[^\"' ]*", page.text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"@import|url\((?!#)|fetch\(|innerHTML|eval\(", page.text)
    contents = [value or "" for name, value in page.attributes if name == "content"]
    allowed = [value for value in contents if "default-src" in value]
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (page.contents["script"][1], page.contents["style"][0])
    ]
    assert allowed == [
        f"default-src 'none'; script-src 'sha256-{digests[0]}'; style-src 'sha256-{digests[1]}';"
        " base-uri 'none'; form-action 'none'"
    ]


def test_run_without_records_experts_or_events_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    (run / "config.yaml").write_text("lr: 1\n")
    page = make_page(run)
    assert page.row("iterations") == ["0"]
    assert page.data == {
        "charts": [],
        "runs": [
            {"name": "new", "curves": [], "phases": [], "events": [], "loads": [], "layers": []}
        ],
    }
    assert "None is recorded." in page.text


def test_wrong_paths_end_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_run.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"ConfigError: {tmp_path} holds no config.yaml; RUN ")
    run, output = make_run(tmp_path / "a"), tmp_path / "gone" / "page.html"
    assert report_run.main([str(run), "--output", str(output)]) == 2
    assert capsys.readouterr().err == (
        f"ConfigError: cannot write --output {output}: No such file or directory; give a file in a"
        " directory that is there and may be written to\n"
    )
    assert report_run.main([str(run), "--output", str(run)]) == 2
    assert "Is a directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
