"""The terminal view: characters decoded back into numbers, frames of every size, following."""

import json
import math
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from megatron.trainer.records.history import RunHistory
from megatron.trainer.records.record_file import append_record
from moe_app.view import terminal_chart, watch
from moe_app.view.screen import RunSnapshot, Screen, draw_frame, take_snapshot
from moe_app.view.terminal_chart import Curve, draw_curves

PLAIN = Screen(width=80, height=23, in_colour=False, ascii_only=False)
COLOUR = Screen(width=80, height=23, in_colour=True, ascii_only=False)
ASCII = Screen(width=80, height=23, in_colour=False, ascii_only=True)


def step(iteration: int, loss: float | None = None, **values: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "consumed_tokens": iteration * 1000,
        "lm_loss": 8.0 - iteration / 100 if loss is None else loss,
        "load_balancing_loss": 1.25,
        "z_loss": 3.5,
        "grad_norm": 0.75,
        "learning_rate": 4e-4,
        "tokens_per_second": 500.0,
        "skipped": 0,
        **values,
    }


def make_run(folder: Path, *, records: int = 30, layers: int = 4, experts: int = 8) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "train_iters: 400\nlog_interval: 10\nglobal_batch_size: 10\nseq_length: 100\n"
    )
    for number in range(1, records + 1):
        append_record(folder / "metrics.jsonl", step(10 * number))
        load = [[0.5 * ((e + layer) % 5) for e in range(experts)] for layer in range(layers)]
        append_record(folder / "expert_load.jsonl", {"iteration": 10 * number, "load": load})
    append_record(
        folder / "metrics.jsonl",
        {"iteration": 10 * records, "valid_loss": {"code": 2.125, "docs": 3.0}},
    )
    for iteration, name in ((0, "start"), (100, "save"), (150, "skip"), (200, "resume")):
        when = f"2026-01-01T00:00:{iteration // 10:02d}Z"
        event = {"iteration": iteration, "event": name, "time": when, "detail": f"why {name}"}
        append_record(folder / "events.jsonl", event)
    return folder


def watched(folder: Path, name: str | None = None) -> RunSnapshot:
    return take_snapshot(name or folder.name, RunHistory(folder), time.time())


def text_of(lines: Sequence[Text]) -> str:
    return "\n".join(line.plain for line in lines)


def dots_of(lines: Sequence[Text]) -> set[tuple[int, int]]:
    """The dots of braille characters, by the Unicode standard's numbering."""
    order = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
    found = set()
    for row, line in enumerate(lines):
        for column, letter in enumerate(line.plain):
            bits = ord(letter) - 0x2800 if letter != " " else 0
            for number, (x, y) in enumerate(order):
                if bits >> number & 1:
                    found.add((2 * column + x, 4 * row + y))
    return found


def chart_margin(lines: Sequence[Text]) -> int:
    """Columns of the labels and the axis."""
    return max(line.plain.index(wall) for line in lines for wall in "│┤" if wall in line.plain) + 1


def test_curve_lies_where_its_numbers_are() -> None:
    xs = [float(x) for x in range(200)]
    ys = [math.sin(x / 30) for x in xs]
    # High and wide enough for each number to be a dot; the highest 5 % run along the top.
    lines = draw_curves(
        [Curve(xs=xs, ys=ys, style="red")], columns=110, rows=26, x_unit="u", ascii_only=False
    )
    assert len(lines) == 26 and all(len(line.plain) == 110 for line in lines)
    margin = chart_margin(lines)
    dots = dots_of([line[margin:] for line in lines[:-1]])
    top, bottom = (float(lines[row].plain[: margin - 1]) for row in (0, 24))
    assert bottom == pytest.approx(min(ys), abs=5e-3)
    assert sorted(ys)[190] == pytest.approx(top, abs=5e-3)
    width, height = 2 * (110 - margin), 100
    for x, y in zip(xs, ys, strict=True):
        column = x / 199 * (width - 1)
        row = (1 - (min(y, top) - bottom) / (top - bottom)) * (height - 1)
        assert any(abs(a - column) <= 1 and abs(b - row) <= 2 for a, b in dots), (x, y)
    assert lines[-1].plain.split() == ["0", "199", "u"]


def test_gap_in_a_curve_stays_empty() -> None:
    ys = [1.0] * 20 + [math.nan] * 20 + [2.0] * 20
    curve = Curve(xs=[float(x) for x in range(60)], ys=ys, style="red")
    lines = draw_curves([curve], columns=66, rows=5, x_unit="", ascii_only=False)
    margin = chart_margin(lines)
    columns = {x for x, _ in dots_of([line[margin:] for line in lines[:-1]])}
    share = [x / (2 * (66 - margin) - 1) for x in columns]
    assert not [each for each in share if 20.5 / 59 < each < 39.5 / 59]
    assert min(share) == 0 and max(share) == 1


def test_curves_without_a_number_say_so() -> None:
    curve = Curve(xs=[1.0], ys=[math.nan], style="red")
    lines = draw_curves([curve], columns=40, rows=4, x_unit="", ascii_only=False)
    assert [line.plain for line in lines] == ["no loss yet", "", "", ""]


def test_sparkline_goes_from_lowest_to_highest() -> None:
    assert terminal_chart.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, ascii_only=False) == "▁▂▃▄▅▆▇█"
    # Two numbers a bar: the means 0.5, 4.5, 2.5.
    assert terminal_chart.sparkline([0, 1, 4, 5, 2, 3], 3, ascii_only=False) == "▁█▅"
    assert terminal_chart.sparkline([1, math.nan, 8], 9, ascii_only=True) == "_ #"
    assert terminal_chart.sparkline([math.nan], 9, ascii_only=True) == ""


def test_heat_strip_tells_loads_apart() -> None:
    loads = [0.0, 0.25, 1.0, 2.0, 3.5]
    for ascii_only, expected in ((False, "·░▒▓█"), (True, ".:+#@")):
        strip = terminal_chart.heat_strip(
            loads, cell_columns=1, in_colour=False, ascii_only=ascii_only
        )
        assert strip.plain == expected
    strip = terminal_chart.heat_strip(loads, cell_columns=2, in_colour=True, ascii_only=False)
    assert strip.plain == "█" * 10
    colours = [str(span.style) for span in strip.spans]
    assert len(set(colours)) == 5
    assert colours[0] == terminal_chart.load_colour(0) and colours[2] == "#8a8a8a"
    reds = [int(colour[1:3], 16) for colour in colours]
    assert reds == sorted(reds)


def test_grouped_rows_are_the_highest_of_neighbours() -> None:
    rows = [[float((7 * row + 3 * e) % 11) for e in range(5)] for row in range(7)]
    for count in range(1, 9):
        groups = terminal_chart.group_rows(rows, count)
        assert len(groups) <= count
        assert [row for first, last, _ in groups for row in range(first, last + 1)] == [
            *range(1, 8)
        ]
        for first, last, values in groups:
            assert values == [max(rows[r - 1][e] for r in range(first, last + 1)) for e in range(5)]


def test_numbers_are_short() -> None:
    numbers = {0.0: "0", 999.4: "999", 999.6: "1k", 1234.0: "1.23k", 3.69e6: "3.69M"}
    numbers |= {5e9: "5G", 4.2e12: "4.2T", 4e-4: "0.0004", -1500.0: "-1.5k"}
    assert {value: terminal_chart.short_number(value) for value in numbers} == numbers


def test_frame_shows_the_last_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    append_record(
        run / "metrics.jsonl",
        step(310, 4.5678, straggler_rank=3, straggler_ratio=1.456, tokens_per_second=2000.0),
    )
    shown = text_of(draw_frame([watched(run)], PLAIN))
    for part in (
        "tiny  running",
        "iteration 310 of 400 ",
        # 90 steps of 1,000 tokens at 500 tokens/s, the median of the last records.
        " 78%, about 3 min of training left",
        "loss 4.5678   valid code 2.1250   valid docs 3.0000   tokens 310k",
        "balance 1.250   z-loss 3.500   skipped 1",
        "straggler rank 3, busy 1.46 x the median",
        "learning rate  4.000e-04",
        "gradient norm      0.750",
        "tokens/s           2,000",
        "expert load, 4 x 8, 6 dead",
        "2026-01-01 00:00:20 resume at 200 why resume",
    ):
        assert part in shown, shown
    # Layer 1 of the last record: loads 0, 0.5, 1, 1.5, 2, 0, 0.5, 1, three columns each.
    assert "\n1 ···░░░▒▒▒▒▒▒▓▓▓···░░░▒▒▒ 2.00\n" in shown


def test_several_runs_share_a_chart_in_colour_and_stand_side_by_side_without(
    tmp_path: Path,
) -> None:
    runs = [watched(make_run(tmp_path / name, records=n)) for name, n in (("a", 30), ("b", 20))]
    for shown_on, titles in ((PLAIN, ["loss of a", "loss of b"]), (COLOUR, ["training loss over"])):
        lines = draw_frame(runs, shown_on)
        shown = text_of(lines)
        assert all(title in shown for title in titles)
        assert re.search(
            r"^a +300 75% +5\.000 +2\.562 +500 +4\.0e-04 +0\.75 +3 min +running", shown, re.M
        )
        assert re.search(r"^b +200 50% +6\.000", shown, re.M)
        assert "a expert load, 4 x 8, 6 dead" in shown and "b expert load" in shown
        assert "b resume at 200 why resume" in shown
    styles = {str(span.style) for line in lines for span in line.spans}
    assert {"color(6)", "color(5)"} <= styles  # of the curves: cyan and magenta


@pytest.mark.parametrize("count", [1, 2, 5])
def test_frame_fits_every_screen(tmp_path: Path, count: int) -> None:
    runs = [
        watched(make_run(tmp_path / f"{n}-{'long' * 9}", records=3 * n, layers=1 + 3 * n))
        for n in range(count)
    ]
    for width in (20, 40, 80, 203):
        for height in (1, 4, 9, 15, 23, 24, 70):
            for in_colour, ascii_only in ((True, False), (False, False), (False, True)):
                screen = Screen(
                    width=width, height=height, in_colour=in_colour, ascii_only=ascii_only
                )
                lines = draw_frame(runs, screen)
                assert len(lines) <= height
                assert max(line.cell_len for line in lines) <= width
                assert not ascii_only or text_of(lines).isascii()
    assert len(draw_frame(runs, PLAIN)) == 23 or count == 1


def test_what_a_terminal_would_obey_is_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evil = "\x1b]0;owned\x07\x9b31m\r\n\u202e"
    for key in ("event", "detail", "time"):
        event = {"iteration": 1, "event": "a", "time": "9", "detail": "d"} | {key: f"x{evil}y"}
        append_record(run / "events.jsonl", event)
    append_record(run / "metrics.jsonl", {"iteration": 300, "valid_loss": {evil: 1.0}})
    (run / "ended.json").write_text(json.dumps({"reason": evil, "detail": evil}))
    tall = Screen(width=150, height=60, in_colour=False, ascii_only=False)
    for runs in ([watched(run, evil)], [watched(run, evil)] * 2):
        shown = text_of(draw_frame(runs, tall))
        assert "]0;owned" in shown
        assert all(letter.isprintable() for letter in shown.replace("\n", ""))


def test_run_without_records_or_experts_is_shown(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("lr: 1\n")
    shown = text_of(draw_frame([watched(tmp_path, "new")], PLAIN))
    assert shown.startswith("new  no record yet\niteration 0\nloss -   tokens -\n")
    assert "no loss yet" in shown and "expert" not in shown
    (tmp_path / "expert_load.jsonl").write_text('{"iteration": 1, "load": [[1.0], []]}\n')
    assert "expert" not in text_of(draw_frame([watched(tmp_path, "new")] * 2, PLAIN))


def test_one_frame_is_printed_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch.main(["--once", "--x", "iterations", str(make_run(tmp_path / "run"))]) == 0
    shown = capsys.readouterr().out
    assert "training loss over iterations" in shown and "300 iterations" in shown
    assert "\x1b" not in shown


def test_directory_without_a_run_ends_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    assert watch.main([str(run), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"ConfigError: {tmp_path} holds no config.yaml; RUN ")
    assert watch.main([str(run), str(run)]) == 2
    assert capsys.readouterr().err.startswith(f"ConfigError: {run} is given twice")
    for interval in ("0", "nan", "x"):
        with pytest.raises(SystemExit) as exit_:
            watch.main([str(run), "--interval", interval])
        assert exit_.value.code == 2


# A viewer that waited for torch would be of no use on a busy node.
FOLLOW = (
    sys.executable,
    "-c",
    "import sys; sys.modules['torch'] = None"
    "; from moe_app.view.watch import main; sys.exit(main(sys.argv[1:]))",
    "--interval",
    "0.1",
)


def environment(**changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "COLUMNS"}}
    return {**kept, "TERM": "xterm-256color", **changes}


def end_run(run: Path) -> None:
    append_record(run / "metrics.jsonl", step(400, 1.2345))
    (run / "ended.tmp").write_text('{"reason": "finished", "requeue": false}')
    (run / "ended.tmp").replace(run / "ended.json")


def test_frames_follow_the_run_and_end_with_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "ended.json").write_text('{"reason": "signal", "requeue": true}')
    with subprocess.Popen(
        [*FOLLOW, str(run)], env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        shown = ""
        while "iteration 300 of 400" not in shown:  # to be started again: it goes on
            line = process.stdout.readline()
            assert line, shown
            shown += line
        end_run(run)
        shown += process.communicate(timeout=300)[0]
    assert process.returncode == 0
    frames = shown.split("run  ended: ")[1:]
    assert frames[0].startswith("signal, to be started again")
    assert frames[-1].startswith("finished") and "loss 1.2345" in frames[-1]
    assert "iteration 400 of 400" in frames[-1] and "iteration 400" not in frames[0]


@pytest.mark.parametrize("no_color", [False, True])
def test_terminal_is_given_back_with_the_last_frame(tmp_path: Path, no_color: bool) -> None:
    run = make_run(tmp_path / "run")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*FOLLOW, str(run)],
        env=environment(**({"NO_COLOR": "1"} if no_color else {})),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = ""
    while True:
        try:
            shown += os.read(master, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            break
        if "iteration 300" in shown and not (run / "ended.json").exists():
            end_run(run)
    os.close(master)
    assert process.wait(timeout=300) == 0
    live, _, after = shown.rpartition("\x1b[?1049l")
    assert "\x1b[?1049h" in live and "iteration 300 of 400" in live
    assert "iteration 400 of 400" in after and "ended: finished" in after
    assert ("\x1b[36m" in after or "38;" in after) is not no_color
