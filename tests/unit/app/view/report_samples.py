"""Run directories for the tests of the HTML page, and a reader of the page."""

import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from megatron.trainer.records.record_file import append_record
from moe_app.view import report_run

SETTINGS = "train_iters: 200\nlog_interval: 10\nglobal_batch_size: 4\nseq_length: 16\nlr: {lr}\n"


def step(iteration: int, seed: int = 0) -> dict[str, Any]:
    draw = random.Random(1000 * seed + iteration)
    per_layer = [1.0 + draw.random() for _ in range(3)]
    return {
        "iteration": iteration,
        "phase": "stable" if iteration <= 120 else "anneal",
        "consumed_tokens": 64 * iteration,
        "consumed_tokens_per_source": {"code": 48 * iteration, "docs": 16 * iteration},
        "lm_loss": None if iteration == 50 else 2.0 + draw.random(),
        "load_balancing_loss": 1.0 + draw.random(),
        "moe_max_load_ratio": max(per_layer),
        "moe_dead_experts": 1.0,
        "layer_max_load_ratio": per_layer,
        "layer_dead_experts": [0.0, 1.0, 0.0],
        "grad_norm": draw.random(),
        "learning_rate": 4e-4 / iteration,
        "tokens_per_second": 32.0 if iteration <= 100 else 64.0,
        "skipped": int(iteration == 50),
        "straggler_rank": 2 if iteration < 150 else 1,
        "straggler_ratio": 1.0 + draw.random(),
    }


def make_run(folder: Path, *, seed: int = 0, lr: str = "0.0004") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(SETTINGS.format(lr=lr))
    metrics, draw = folder / "metrics.jsonl", random.Random(seed)
    for iteration in range(10, 201, 10):
        append_record(metrics, step(iteration, seed))
        load = [[round(draw.random() * 2, 4) for _ in range(4)] for _ in range(3)]
        append_record(folder / "expert_load.jsonl", {"iteration": iteration, "load": load})
        if iteration % 50 == 0:
            losses = {"code": 3.0 - iteration / 1000, "docs": None if iteration == 50 else 3.5}
            record = {"iteration": iteration, "consumed_tokens": 64 * iteration}
            append_record(metrics, {**record, "valid_loss": losses})
    for iteration, name, detail in (
        (0, "start", "1 rank"),
        (50, "skip", "loss is nan"),
        (100, "save", "iter_0000100"),
        (110, "resume", "from iter_0000100"),
        (200, "end", "finished"),
    ):
        when = f"2026-01-01T00:{iteration // 10:02d}:00Z"
        event = {"iteration": iteration, "event": name, "time": when, "detail": detail}
        append_record(folder / "events.jsonl", event)
    (folder / "ended.json").write_text('{"reason": "finished", "requeue": false}')
    return folder


class Page(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = text
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.contents: dict[str, list[str]] = {"script": [], "style": [], "title": [], "h1": []}
        self.rows: list[list[str]] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._in = tag
        if tag in self.contents:
            self.contents[tag].append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in in self.contents:
            self.contents[self._in][-1] += data
        elif self._in in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def own_length(self) -> int:
        """Letters without plotly's."""
        return len(self.text) - len(self.contents["script"][0])

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.contents["script"][1])

    @property
    def curves(self) -> dict[str, Any]:
        """The figure of the curves."""
        return self.data["figures"][0]

    def traces(self, key: str, run: int) -> list[dict[str, Any]]:
        """What is drawn of a run and has `key` in its meta."""
        traces = self.curves["data"]
        own = [each for each in traces if each.get("legendgroup") == f"run {run}"]
        return [each for each in own if key in each.get("meta", {})]

    def curve(self, run: int, chart: str, label: str) -> list[tuple[Any, Any, Any]]:
        """Iterations, tokens and values of a curve over tokens."""
        named = {"chart": chart, "label": label}
        (found,) = (each for each in self.traces("chart", run) if each["meta"] == named)
        where = found["customdata"]
        iterations = [each[0] if isinstance(each, list) else each for each in where]
        return list(zip(iterations, found["x"], found["y"], strict=True))

    def row(self, question: str) -> list[str]:
        (found,) = (row[1:] for row in self.rows if row[0] == question)
        return found


def make_page(*runs: Path, output: Path | None = None) -> Page:
    output = output or runs[0].parent / "report.html"
    assert report_run.main([*map(str, runs), "--output", str(output)]) == 0
    return Page(output.read_text("utf-8"))
