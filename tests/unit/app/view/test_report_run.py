"""The HTML page: its numbers are those of the run directory, and nothing in it is obeyed."""

import base64
import hashlib
import html
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from megatron.trainer.records.record_file import append_record, read_records
from moe_app.view import page_data, report_run
from moe_app.view.curve_figure import cut_of
from tests.unit.app.view.report_samples import Page, make_page, make_run, step


def test_numbers_of_the_page_are_those_of_the_records(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    page = make_page(*folders)
    for run, folder in enumerate(folders):
        records = list(read_records(folder / "metrics.jsonl"))
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
            assert page.curve(run, chart, label) == expected
        for source in ("code", "docs"):
            assert [value for _, _, value in page.curve(run, "sources", source)] == [
                record["consumed_tokens_per_source"][source] for record in steps
            ]
            assert page.curve(run, "loss", f"validation: {source}") == [
                (record["iteration"], record["consumed_tokens"], record["valid_loss"][source])
                for record in records
                if "valid_loss" in record
            ]
        (slowest,) = (e for e in page.traces("chart", run) if e["meta"]["chart"] == "straggler")
        assert [rank for _, rank in slowest["customdata"]] == [r["straggler_rank"] for r in steps]


def test_page_of_an_alignment_has_rewards_log_probabilities_and_kl(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    charts = {
        ("rewards", "chosen"): "rewards_chosen",
        ("rewards", "rejected"): "rewards_rejected",
        ("rewards", "margin"): "rewards_margin",
        ("accuracy", "training"): "rewards_accuracy",
        ("log_probs", "chosen"): "logps_chosen",
        ("log_probs", "rejected"): "logps_rejected",
        ("kl", "training"): "kl",
    }
    records = []
    for record in read_records(folder / "metrics.jsonl"):
        if "lm_loss" in record:
            loss = {"kto_loss": record.pop("lm_loss")}
            at = record["iteration"]
            more = {name: at + number / 8 for number, name in enumerate(charts.values())}
            records.append(record | loss | more)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    page = make_page(folder)
    for (chart, label), name in charts.items():
        assert [value for _, _, value in page.curve(0, chart, label)] == [
            record[name] for record in records
        ]


def test_events_and_phases_are_marked_where_they_were(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    page = make_page(*folders)
    for run, folder in enumerate(folders):
        events = list(read_records(folder / "events.jsonl"))
        (marks,) = page.traces("events", run)
        assert marks["x"] == [64 * event["iteration"] for event in events]
        assert marks["y"] == [run] * len(events)
        assert marks["text"] == [
            f"{event['event']} at {event['iteration']:,}: {event['detail']}" for event in events
        ]
        symbols = dict(zip(marks["meta"]["events"], marks["marker"]["symbol"], strict=True))
        assert symbols["save"] == "line-ns" and len(set(symbols.values())) == 4
        (lines,) = page.traces("lines", run)  # across the loss, for what disturbs it
        assert lines["x"] == [64 * 50, 64 * 50, None, 64 * 110, 64 * 110, None]
        (lost,) = [e for e in page.traces("lost", run) if e["meta"]["lost"] == "training"]
        assert lost["x"] == [64 * 50]
    shapes = [(e["x0"], e["x1"], e["label"]["text"]) for e in page.curves["layout"]["shapes"]]
    assert shapes == [(0, 64 * 120, "stable"), (64 * 120, 64 * 200, "anneal")]


def test_expert_loads_are_those_of_the_records(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    _, figure = make_page(folder).data["figures"]
    by_record, by_layer, highest, dead = figure["data"]
    written = list(read_records(folder / "expert_load.jsonl"))
    assert by_record["z"] == written[-1]["load"]
    (slider,) = figure["layout"]["sliders"]
    assert [step["label"] for step in slider["steps"]] == [f"{r['iteration']}" for r in written]
    assert [step["args"] for step in slider["steps"]] == [
        [{"z": [record["load"]]}, [0]] for record in written
    ]
    (menu,) = figure["layout"]["updatemenus"]
    for layer, button in enumerate(menu["buttons"]):
        (rows,) = button["args"][0]["z"]
        assert button["args"][1] == [1]
        for expert, row in enumerate(rows):
            assert row == [record["load"][layer][expert] for record in written]
    assert by_layer["z"] == menu["buttons"][0]["args"][0]["z"][0]
    assert by_layer["x"] == [record["iteration"] for record in written]
    steps = [r for r in read_records(folder / "metrics.jsonl") if "lm_loss" in r]
    for drawn, key in ((highest, "layer_max_load_ratio"), (dead, "layer_dead_experts")):
        assert drawn["x"] == [record["iteration"] for record in steps]
        assert drawn["z"] == [[record[key][layer] for record in steps] for layer in range(3)]
    # Blue at no load, neutral at an even share, red at four times as much.
    axis = figure["layout"]["coloraxis"]
    scale = {axis["cmax"] * place: colour for place, colour in axis["colorscale"]}
    (blue, neutral, red) = ([int(scale[at][i : i + 2], 16) for i in (1, 3, 5)] for at in (0, 1, 4))
    assert blue[2] > 2 * blue[0] and red[0] > 2 * red[2] and max(neutral) - min(neutral) < 16


def test_axes_are_shared_and_can_be_switched(tmp_path: Path) -> None:
    page = make_page(make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1))
    layout, data = page.curves["layout"], page.curves["data"]
    axes = {name for name in layout if re.fullmatch(r"xaxis\d*", name)} - {"xaxis"}
    assert axes and all(layout[name]["matches"] == "x" for name in axes)
    over, log_x, log_y = layout["updatemenus"]
    by_label = {button["label"]: button["args"] for button in over["buttons"]}
    tokens, iterations = (by_label[f"over {x}"] for x in ("tokens", "iterations"))
    assert tokens[0]["x"] == [trace["x"] for trace in data]
    assert tokens[1]["shapes"] == layout["shapes"]
    for at, trace in zip(iterations[0]["x"], data, strict=True):
        assert at == [x if x is None else x // 64 for x in trace["x"]]
    assert [shape["x0"] for shape in iterations[1]["shapes"]] == [0, 120]
    (button,) = log_x["buttons"]
    for args, kind in ((button["args"], "log"), (button["args2"], "linear")):
        assert {args[0][f"{axis}.type"] for axis in (*axes, "xaxis")} == {kind}
    (button,) = log_y["buttons"]
    charts = {each["yaxis"] for run in (0, 1) for each in page.traces("chart", run)}
    switched = {key.removesuffix(".type") for key in button["args"][0] if key.endswith(".type")}
    assert switched == {each.replace("y", "yaxis") for each in charts}


@pytest.mark.parametrize(
    ("highest", "cut"), [([9.0, 8.0], 3.0), ([3.2, 3.1], None), ([], None), ([50.0] * 8, None)]
)
def test_an_axis_is_cut_below_the_few_values_that_are_far_above(
    highest: list[float], cut: float | None
) -> None:
    values = [2.0 + index / 97 for index in range(98)] if highest else []
    assert cut_of(values + highest) == (None if cut is None else pytest.approx(cut, abs=0.05))


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
    assert page.own_length < 1_500_000
    points = page.curve(0, "loss", "training")
    assert 900 < len(points) <= page_data.MAX_POINTS
    assert points[0][0] == 1 and points[-1][0] == 40_000
    assert {(13_334, 50.0), (27_778, 0.125)} <= {(at, value) for at, _, value in points}
    assert all(value == losses[at - 1] and tokens == 64 * at for at, tokens, value in points)
    figure = page.data["figures"][1]
    layers = figure["data"][2]["z"]
    assert [len(row) for row in layers] == [page_data.MAX_COLUMNS] * 2
    assert max(layers[0]) == 50.0
    labels = [step["label"] for step in figure["layout"]["sliders"][0]["steps"]]
    assert len(labels) == 50_000 // 64**2 and (labels[0], labels[-1]) == ("1", "100")
    assert f"{len(labels)} of 100 records" in figure["layout"]["annotations"][0]["text"]
    (marks,) = page.traces("events", 0)
    events = marks["meta"]["events"]
    assert len(events) == page_data.MAX_EVENTS
    assert events.count("skip") == 20
    assert events[-2] == "save" and marks["text"][-2].startswith("save at 1,999")
    assert "1,600 older ones are left out" in page.text


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--\u2028"
TAGS = set(
    "html head meta title style body h1 h2 h3 p div table thead tbody tr th td details summary"
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
    assert page.tags.count("script") == 3 and page.tags.count("style") == 1
    names = {name for name, _ in page.attributes}
    assert names == set("lang charset http-equiv content name id class scope open type".split())
    assert not set(page.contents["script"][1]) & set("<>&")
    # It is all there as text.
    assert page.contents["title"] == page.contents["h1"] == [f"{EVIL.replace('/', '')}, other"]
    assert page.row("state")[0] == f"ended: {EVIL}: {EVIL}"
    assert [EVIL, EVIL, "not set"] in page.rows


def drawn_texts(value: Any, key: str = "") -> Iterator[str]:
    """All texts of a figure but those of `meta`, which nothing draws."""
    if isinstance(value, str):
        yield value
    for inner, each in value.items() if isinstance(value, dict) else ():
        if inner != "meta":
            yield from drawn_texts(each, inner)
    for each in value if isinstance(value, list) else ():
        yield from drawn_texts(each, key)


def test_nothing_from_a_run_is_markup_to_plotly(tmp_path: Path) -> None:
    """Which draws links, styles and line breaks that it finds in texts."""
    link = "<a href='https://x.example'>x</a><br>&lt;"
    run = make_run(tmp_path / link.replace("/", ""))
    record = {**step(210), "phase": link, "consumed_tokens_per_source": {link: 1, "code": 2}}
    append_record(run / "metrics.jsonl", record)
    append_record(run / "metrics.jsonl", {**record, "iteration": 220})
    append_record(run / "metrics.jsonl", {"iteration": 220, "valid_loss": {link: 1.0}})
    event = {"iteration": 3, "event": link, "time": "", "detail": link}
    append_record(run / "events.jsonl", event)
    page = make_page(run, make_run(tmp_path / "other"), output=tmp_path / "page.html")
    texts = set(drawn_texts(page.data["figures"]))
    assert not [text for text in texts if re.search(r"<(?!/?b>|/?extra>)", text)]
    escaped = html.escape(link, quote=False)
    assert len([text for text in texts if escaped in text]) >= 4
    assert any(html.escape(link.replace("/", ""), quote=False) in text for text in texts)


def test_page_loads_nothing_and_allows_only_its_own_scripts(tmp_path: Path) -> None:
    page = make_page(make_run(tmp_path / "a"))
    library, _, own = page.contents["script"]
    assert library == get_plotlyjs()
    rest = page.text.replace(library, "")
    assert not re.search(r"\w+://|@import|url\(|fetch\(|innerHTML|eval\(| src=| href=", rest)
    contents = [value or "" for name, value in page.attributes if name == "content"]
    allowed = [value for value in contents if "default-src" in value]
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (library, own)
    ]
    assert allowed == [
        f"default-src 'none'; script-src 'sha256-{digests[0]}' 'sha256-{digests[1]}';"
        " style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    ]


def test_run_without_records_experts_or_events_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    (run / "config.yaml").write_text("lr: 1\n")
    page = make_page(run)
    assert page.row("iterations") == ["0"]
    assert page.data["figures"] == []
    assert "No run has experts." in page.text
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
