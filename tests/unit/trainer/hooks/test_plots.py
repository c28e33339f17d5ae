"""Plots are drawn from the records, and replaced atomically. How they look was judged by eye."""

import json
import math
import os
import struct
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.hooks import plots
from megatron.trainer.hooks.plots import (
    RunCurves,
    RunPlots,
    new_figure,
    plot_expert_load,
    plot_learning_rate,
    plot_losses,
    plot_preferences,
    plot_sources,
    write_figure,
)
from megatron.trainer.records.record_file import (
    Record,
    append_record,
    keep_records_until,
    read_records,
)

PNG = b"\x89PNG\r\n\x1a\n"

pytestmark = pytest.mark.usefixtures("with_pixels")


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, of a file that begins and ends as a PNG does."""
    content = path.read_bytes()
    assert content.startswith(PNG)
    assert content.rstrip().endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def curves_of(records: Iterable[Record]) -> RunCurves:
    curves = RunCurves()
    for record in records:
        curves.add(record)
    return curves


def write_records(path: Path, *, steps: int = 40, valid: tuple[str, ...] = ("books",)) -> None:
    for step in range(1, steps + 1):
        at = {"iteration": step, "consumed_tokens": step * 1000}
        append_record(path, {**at, "lm_loss": 3 + 5 / step})
        if valid and step % 10 == 0:
            losses = {name: 3.2 + index + 5 / step for index, name in enumerate(valid)}
            append_record(path, {**at, "valid_loss": losses})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every figure written."""
    found: list[Any] = []

    def write(figure: Any, path: Path) -> None:
        found.extend(figure.axes)
        write_figure(figure, path)

    monkeypatch.setattr(plots, "write_figure", write)
    return found


def test_loss_plot_shows_every_record(tmp_path: Path, drawn: list[Any]) -> None:
    write_records(tmp_path / "metrics.jsonl", valid=("books", "code"))
    plot_losses(curves_of(read_records(tmp_path / "metrics.jsonl")), tmp_path / "loss.png")
    (axes,) = drawn
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    tens = range(10, 41, 10)
    assert lines == {
        "training": [[step * 1000, 3 + 5 / step] for step in range(1, 41)],
        "validation: books": [[step * 1000, 3.2 + 5 / step] for step in tens],
        "validation: code": [[step * 1000, 4.2 + 5 / step] for step in tens],
    }
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "loss (nats per token)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
    assert png_size(tmp_path / "loss.png") == (1050, 600)


def test_each_curve_has_a_colour_of_its_own(tmp_path: Path, drawn: list[Any]) -> None:
    write_records(tmp_path / "metrics.jsonl", valid=("a", "b", "c", "d"))
    plot_losses(curves_of(read_records(tmp_path / "metrics.jsonl")), tmp_path / "loss.png")
    assert len({line.get_color() for line in drawn[0].lines}) == 5


def test_run_without_validation_has_a_plot_too(tmp_path: Path, drawn: list[Any]) -> None:
    write_records(tmp_path / "metrics.jsonl", valid=())
    plot_losses(curves_of(read_records(tmp_path / "metrics.jsonl")), tmp_path / "loss.png")
    assert [line.get_label() for line in drawn[0].lines] == ["training"]


def test_loss_that_was_not_finite_leaves_a_gap(tmp_path: Path, drawn: list[Any]) -> None:
    write_records(tmp_path / "metrics.jsonl", steps=3, valid=())
    append_record(
        tmp_path / "metrics.jsonl",
        {"iteration": 4, "consumed_tokens": 4000, "lm_loss": math.nan},
    )
    plot_losses(curves_of(read_records(tmp_path / "metrics.jsonl")), tmp_path / "loss.png")
    y = drawn[0].lines[0].get_ydata(orig=False)
    assert len(y) == 4
    assert math.isnan(y[3])


def test_without_records_there_is_no_plot(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    plot_losses(
        curves_of(read_records(tmp_path / "metrics.jsonl")), tmp_path / "plots" / "loss.png"
    )
    plot_losses(
        curves_of(read_records(tmp_path / "missing.jsonl")), tmp_path / "plots" / "loss.png"
    )
    assert not (tmp_path / "plots").exists()


def test_hook_draws_after_evaluations_and_at_the_end(tmp_path: Path) -> None:
    metrics, path = tmp_path / "metrics.jsonl", tmp_path / "plots" / "loss.png"
    hook = RunPlots(metrics, path.parent)
    hook.on_start(0, 10)
    write_records(metrics, steps=10)
    assert not path.exists()
    hook.on_evaluation({})
    first = path.read_bytes()
    write_records(metrics, steps=20)
    hook.on_end()
    assert path.read_bytes() != first
    assert png_size(path) == (1050, 600)
    assert [entry.name for entry in path.parent.iterdir()] == ["loss.png"]


def phased(step: int, phase: str, **sources: int) -> dict[str, Any]:
    """A record of a run that changes its mixture."""
    return {
        "iteration": step,
        "phase": phase,
        "consumed_tokens": 100 * step,
        "consumed_tokens_per_source": sources,
        "lm_loss": 4.0,
        "learning_rate": 1e-3 / step,
    }


PHASED = [
    phased(1, "stable", web=70, code=30),
    phased(2, "stable", web=140, code=60),
    phased(3, "decay", web=170, code=70, math=60),
]


def test_learning_rate_is_drawn_with_the_begin_of_each_phase(
    tmp_path: Path, drawn: list[Any]
) -> None:
    plot_learning_rate(curves_of(PHASED), tmp_path / "rate.png")
    curve, border = drawn[0].lines
    assert curve.get_xydata().tolist() == [[100, 1e-3], [200, 5e-4], [300, 1e-3 / 3]]
    assert list(border.get_xdata()) == [200, 200]
    assert [text.get_text().strip() for text in drawn[0].texts] == ["decay"]
    assert (drawn[0].get_xlabel(), drawn[0].get_ylabel()) == ("tokens", "learning rate")
    plot_losses(curves_of(PHASED), tmp_path / "loss.png")
    assert [text.get_text().strip() for text in drawn[1].texts] == ["decay"]


def test_each_source_has_a_curve_from_its_first_record_on(tmp_path: Path, drawn: list[Any]) -> None:
    plot_sources(curves_of(PHASED), tmp_path / "sources.png")
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].lines}
    del lines["_phase"]
    assert lines == {
        "web": [[100, 70], [200, 140], [300, 170]],
        "code": [[100, 30], [200, 60], [300, 70]],
        "math": [[100, 0], [200, 0], [300, 60]],
    }
    assert [text.get_text() for text in drawn[0].get_legend().get_texts()] == list(lines)


def test_sources_differ_in_colour_or_style(tmp_path: Path, drawn: list[Any]) -> None:
    many = {f"source {index}": index for index in range(16)}
    plot_sources(curves_of([phased(1, "one", **many)]), tmp_path / "sources.png")
    looks = {(line.get_color(), line.get_linestyle()) for line in drawn[0].lines}
    assert len(looks) == 16


def test_one_source_needs_no_plot(tmp_path: Path) -> None:
    plot_sources(curves_of([phased(1, "one", web=100)]), tmp_path / "sources.png")
    plot_sources(RunCurves(), tmp_path / "sources.png")
    plot_learning_rate(RunCurves(), tmp_path / "rate.png")
    assert not list(tmp_path.iterdir())


def test_hook_draws_everything_there_is(tmp_path: Path) -> None:
    for record in PHASED:
        append_record(tmp_path / "metrics.jsonl", record)
    RunPlots(tmp_path / "metrics.jsonl", tmp_path / "plots").on_end()
    names = sorted(entry.name for entry in (tmp_path / "plots").iterdir())
    assert names == ["learning_rate.png", "loss.png", "sources.png"]


def test_plot_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader never sees part of a plot, and a failure leaves the older one."""
    path = tmp_path / "plot.png"
    write_figure(new_figure(2.0, 1.0)[0], path)
    assert png_size(path) == (300, 150)
    older = path.read_bytes()
    figure, _ = new_figure(4.0, 1.0)
    seen = []
    replace = os.replace

    def look_and_replace(source: Path, target: Path) -> None:
        seen.append((target.read_bytes() == older, png_size(source)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_and_replace)
    write_figure(figure, path)
    assert seen == [(True, (600, 150))]
    assert [entry.name for entry in tmp_path.iterdir()] == ["plot.png"]

    def fail(*_args: object, **_named: object) -> None:
        raise OSError("no space left on device")

    newer = path.read_bytes()
    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        write_figure(figure, path)
    assert path.read_bytes() == newer
    assert [entry.name for entry in tmp_path.iterdir()] == ["plot.png"]


def test_heat_map_has_a_cell_for_every_expert_of_every_layer(
    tmp_path: Path, drawn: list[Any]
) -> None:
    load = [[0.0, 1.0, 3.0], [1.0, 1.0, 1.0]]
    plot_expert_load(load, tmp_path / "load.png", title="expert load, iteration 9")
    axes, bar = drawn
    (image,) = axes.images
    assert image.get_array().tolist() == load
    # Even is the middle of the colours, nothing the one end, the busiest expert the other.
    assert [image.norm(value) for value in (0.0, 1.0, 3.0)] == [0.0, 0.5, 1.0]
    assert axes.get_title() == "expert load, iteration 9"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "layer")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]
    assert bar.get_ylabel() == "load (1 = even share)"


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (16, 64), (32, 128)])
def test_heat_map_grows_with_the_model_and_stays_readable(
    layers: int, experts: int, tmp_path: Path
) -> None:
    load = [[1.0] * experts for _ in range(layers)]
    plot_expert_load(load, tmp_path / "load.png", title="x")
    width, height = png_size(tmp_path / "load.png")
    # 600 pixels at least; 16 for an expert and 33 for a layer of a large model.
    assert width >= max(600, 16 * experts)
    assert height >= max(330, 33 * layers)
    assert width <= 2500
    assert height <= 1500


def test_hook_draws_what_a_rewind_left_and_what_came_after(
    tmp_path: Path, drawn: list[Any]
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    write_records(metrics, steps=20, valid=())
    hook = RunPlots(metrics, tmp_path)
    hook.on_evaluation({})
    keep_records_until(metrics, 15)
    for step in range(16, 31):
        append_record(metrics, {"iteration": step, "consumed_tokens": step * 1000, "lm_loss": 9.0})
    hook.on_end()
    before, after = [axes.lines[0].get_ydata().tolist() for axes in drawn]
    assert before == [3 + 5 / step for step in range(1, 21)]
    assert after == [3 + 5 / step for step in range(1, 16)] + [9.0] * 15


def test_memory_for_curves_does_not_grow_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 MB of records."""
    metrics = tmp_path / "metrics.jsonl"
    rest = json.dumps({"consumed_tokens_per_source": {"web": 7, "code": 3}, "x": "x" * 4000})[1:]
    with metrics.open("w") as file:
        for step in range(5000):
            at = f'"iteration": {step}, "consumed_tokens": {step}, "lm_loss": {step % 977}'
            file.write(f'{{{at}, "learning_rate": 0.001, {rest}\n')
    found: list[RunCurves] = []
    for name in ("plot_losses", "plot_learning_rate", "plot_sources"):
        monkeypatch.setattr(plots, name, lambda curves, _path: found.append(curves))
    tracemalloc.start()
    RunPlots(metrics, tmp_path).on_end()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3e6
    losses = [loss for _, loss in found[0].loss.points]
    assert len(losses) < 2100
    assert (min(losses), max(losses)) == (0, 976)


def aligned(step: int, method: str) -> Record:
    """A record of alignment, with a reward that was not finite."""
    names = ("rewards_chosen", "rewards_rejected", "rewards_margin", "rewards_accuracy")
    names += ("logps_chosen", "logps_rejected", *(("kl",) if method == "kto" else ()))
    figures: dict[str, Any] = {name: step + number / 8 for number, name in enumerate(names)}
    figures["rewards_rejected"] = None if step == 2 else figures["rewards_rejected"]
    return {"consumed_tokens": 1000 * step, f"{method}_loss": 1 / step, **figures}


@pytest.mark.parametrize(("method", "num_axes"), [("dpo", 3), ("kto", 4)])
def test_alignment_has_a_plot_of_rewards_accuracy_log_probabilities_and_kl(
    tmp_path: Path, drawn: list[Any], method: str, num_axes: int
) -> None:
    records = [aligned(step, method) for step in (1, 2, 3)]
    evaluation: dict[str, Any] = {"consumed_tokens": 3000, "valid_loss": {"valid": 0.5}}
    evaluation["valid_metrics"] = {"valid": {"rewards_chosen": 0.25, "rewards_accuracy": 0.75}}
    plot_preferences(curves_of([*records, evaluation]), tmp_path / "preferences.png")
    assert png_size(tmp_path / "preferences.png") == (1050, round(150 * (0.6 + 2.1 * num_axes)))
    assert len(drawn) == num_axes
    found = {
        (axes.get_ylabel().split(" ")[0], line.get_label()): line.get_xydata().tolist()
        for axes in drawn
        for line in axes.lines
    }
    curves = {
        ("rewards", "chosen"): "rewards_chosen",
        ("rewards", "margin"): "rewards_margin",
        ("preferences", "training"): "rewards_accuracy",
        ("log-probabilities", "chosen"): "logps_chosen",
        ("log-probabilities", "rejected"): "logps_rejected",
        **({("KL", "training"): "kl"} if method == "kto" else {}),
    }
    for place, name in curves.items():
        expected = [[record["consumed_tokens"], record[name]] for record in records]
        assert found.pop(place) == expected, place
    rejected = found.pop(("rewards", "rejected"))
    assert [y for _, y in rejected][::2] == [1.125, 3.125] and math.isnan(rejected[1][1])
    assert found.pop(("rewards", "_valid")) == [[3000, 0.25]]
    assert found.pop(("preferences", "validation: valid")) == [[3000, 0.75]]
    assert not found


def test_other_stages_have_no_plot_of_preferences(tmp_path: Path) -> None:
    write_records(tmp_path / "metrics.jsonl")
    plot_preferences(curves_of(read_records(tmp_path / "metrics.jsonl")), tmp_path / "made.png")
    assert not (tmp_path / "made.png").exists()
