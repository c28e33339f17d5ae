"""The tasks' scores are in the log, the plots, the report and the page as the records have them."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.hooks import plots
from megatron.trainer.hooks.console import Console
from megatron.trainer.records.history import RunHistory
from megatron.trainer.records.tasks import task_results
from moe_app.view import html_page, page_data, report

pytestmark = pytest.mark.usefixtures("with_pixels")

NAMES = ("none", "char", "byte")


def evaluation(iteration: int, *chars: float | None, **more: Any) -> dict[str, Any]:
    """A record of the tasks `a`, `b` and so on, whose other scores follow from `chars`."""
    tasks = dict(zip("abc", chars, strict=False))
    bits = {name: None if char is None else 2 - char for name, char in tasks.items()}
    return {
        "iteration": iteration,
        "consumed_tokens": iteration * 100,
        "valid_loss": {},
        "task_accuracy": {
            name: {"none": 0.25, "char": char, "byte": 0.5} for name, char in tasks.items()
        },
        "task_bits_per_byte": bits,
        "task_seconds": 1.25,
        **more,
    }


STEP = {"iteration": 1, "consumed_tokens": 100, "lm_loss": 3.0, "tokens_per_second": 5.0}
RECORDS = [STEP, evaluation(10, 0.5, 0.25), evaluation(20, 0.75, 0.125), evaluation(30, 0.625, 0.2)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("train_iters: 30\n")
    lines = (json.dumps(record) + "\n" for record in RECORDS)
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    return tmp_path


def test_log_has_a_line_for_tasks_and_none_for_no_validation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    Console(progress=False).on_evaluation(evaluation(10, 0.5, 0.25))
    assert caplog.messages == [
        "iteration 10 | tasks: a 50.0%, 1.500 bits per byte; b 25.0%, 1.750 bits per byte, in 1.2 s"
    ]


def test_report_tabulates_last_and_best() -> None:
    assert report.describe_tasks(task_results(RECORDS)) == [
        "task accuracy   none   char   byte   best char    bits per byte",
        "a               25.0%  62.5%  50.0%  75.0% at 20  1.3750",
        "b               25.0%  20.0%  50.0%  25.0% at 10  1.8000",
        "",
    ]
    assert report.describe_tasks(task_results([STEP])) == []


def test_plot_has_a_curve_for_each_task(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    write = plots.write_figure

    def keep(figure: Any, path: Path) -> None:
        drawn.append((path.name, figure))
        write(figure, path)

    monkeypatch.setattr(plots, "write_figure", keep)
    plots.RunPlots(run / "metrics.jsonl", tmp_path / "plots").on_end()
    (figure,) = [figure for name, figure in drawn if name == "tasks.png"]
    above, below = (
        {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for axes in figure.axes
    )
    assert above == {
        "a": [[1000, 0.5], [2000, 0.75], [3000, 0.625]],
        "b": [[1000, 0.25], [2000, 0.125], [3000, 0.2]],
    }
    assert below["b"] == [[1000, 1.75], [2000, 1.875], [3000, 1.8]]
    assert (tmp_path / "plots" / "tasks.png").stat().st_size > 1000
    drawn.clear()
    (run / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    plots.RunPlots(run / "metrics.jsonl", tmp_path / "others").on_end()
    assert "tasks.png" not in [name for name, _ in drawn]


def test_page_has_charts_and_answers(run: Path) -> None:
    history = RunHistory(run, layer_keys=tuple(page_data.LAYER_KEYS))
    page = page_data.page_data([("run", history)])
    curves = {(each["chart"], each["label"]): each for each in page["runs"][0]["curves"]}
    assert curves["tasks", "a"]["value"] == [0.5, 0.75, 0.625]
    assert curves["tasks", "a"]["iteration"] == [10, 20, 30]
    assert curves["task_bits", "b"]["tokens"] == [1000, 2000, 3000]
    assert {"tasks", "task_bits"} <= {each["key"] for each in page["charts"]}
    rows = dict(html_page.summary_rows([("run", history)], [history.state(0.0)]))
    assert rows["task accuracy: a"] == "62.5% (best 75.0% at 20), 1.375 bits per byte"


@pytest.mark.parametrize(
    "hostile",
    [3, [], {"a": 4}, {"a": {"char": "x"}}, {"a": {"char": True}}, {"a": {"char": 10**400}}],
)
def test_records_that_no_run_wrote_are_no_scores(hostile: Any) -> None:
    record = {**evaluation(10), "task_accuracy": hostile, "task_bits_per_byte": hostile}
    assert all(task.best is None for task in task_results([record]))


def test_score_that_is_not_finite_is_not_known() -> None:
    (task,) = task_results([evaluation(10, 0.5), evaluation(20, None, task_bits_per_byte={"a": 1})])
    assert math.isnan(task.accuracy.get("char", math.nan)) and task.best == 0.5
