"""Perplexity and bits per byte are shown as the records have them."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.hooks import plots
from megatron.trainer.records.history import RunHistory
from megatron.trainer.records.perplexity import last_figures
from moe_app.view import html_page, page_data, report

STEP = {"iteration": 1, "consumed_tokens": 100, "lm_loss": 3.0, "tokens_per_second": 5.0}


def evaluation(iteration: int, bits: float) -> dict[str, Any]:
    """A record of a set whose name has a slash."""
    figures = {"perplexity": 8 * bits, "bits_per_byte": bits}
    return {
        "iteration": iteration,
        "consumed_tokens": iteration * 100,
        "valid_loss": {"a/web": 2.0},
        "valid_metrics": {"a/web": figures},
        "valid_documents": {"a/web": {**figures, "bits_per_byte": bits / 2, "documents": 3}},
    }


RECORDS = [STEP, evaluation(10, 2.0), evaluation(20, 1.5)]


def test_report_page_and_plot_have_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("train_iters: 30\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in RECORDS))
    assert report.describe_perplexity(last_figures(RECORDS)) == [
        "validation         perplexity  bits per byte",
        "a/web (tokens)     12.0000     1.5000",
        "a/web (documents)  12.0000     0.7500",
        "",
    ]
    assert report.describe_perplexity(last_figures([STEP])) == []
    history = RunHistory(tmp_path, layer_keys=tuple(page_data.LAYER_KEYS))
    page = page_data.page_data([("run", history)])
    curves = {(each["chart"], each["label"]): each for each in page["runs"][0]["curves"]}
    assert curves["perplexity", "a/web (tokens)"]["value"] == [16.0, 12.0]
    assert curves["bits", "a/web (documents)"]["value"] == [1.0, 0.75]
    rows = dict(html_page.summary_rows([("run", history)], [history.state(0.0)]))
    assert rows["bits per byte: a/web (tokens)"] == "1.5000"
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        plots, "write_figure", lambda figure, path: drawn.update({path.name: figure})
    )
    plots.RunPlots(tmp_path / "metrics.jsonl", tmp_path / "plots").on_end()
    above, below = drawn["bits_per_byte.png"].axes
    assert above.get_yscale() == "log" and len(above.lines) == 2
    found = {line.get_label(): line.get_xydata().tolist() for line in below.lines}
    assert found["a/web (documents)"] == [[1000, 1.0], [2000, 0.75]]
