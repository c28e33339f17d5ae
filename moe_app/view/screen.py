"""Draws a frame of the terminal view as a list of lines of given width and height."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from megatron.trainer.records.history import (
    Event,
    RunHistory,
    RunState,
    duration,
    validation_results,
)
from megatron.trainer.records.run_dir import LOAD_NAME, LOAD_TITLES, last_record, loads_of
from moe_app.view.terminal_chart import (
    Curve,
    draw_curves,
    group_rows,
    heat_strip,
    shade_legend,
    short_number,
    sparkline,
)

RUN_STYLES = ("cyan", "magenta", "yellow", "green", "blue", "red")
_STATE_STYLES = {"starting": "cyan", "running": "green", "silent": "bold red", "ended": "bold"}
_EVENT_STYLES = {"skip": "red", "rewind": "red", "fallback": "red", "end": "bold"}
_X_UNITS = {"consumed_tokens": "tokens", "iteration": "iterations"}


@dataclass(frozen=True, kw_only=True)
class Screen:
    """Describes the terminal to draw on."""

    width: int
    """Columns."""
    height: int
    """Rows."""
    in_colour: bool
    """Whether colours are shown."""
    ascii_only: bool
    """Whether nothing but ASCII is shown."""
    x: str = "consumed_tokens"
    """What the loss is drawn over, a name in a step's record."""


@dataclass(frozen=True, kw_only=True)
class RunSnapshot:
    """Holds the state of a run at one moment."""

    name: str
    """What it is called on the screen."""
    history: RunHistory
    """What its directory told."""
    state: RunState
    """Whether it goes on."""
    load: Mapping[str, list[list[float]]]
    """Of the last record: [layers][experts] by kind of router."""


def take_snapshot(name: str, history: RunHistory, now: float) -> RunSnapshot:
    """Take a snapshot of a run.

    Args:
        name: what to call it.
        history: what its directory told, refreshed.
        now: seconds since 1970.
    """
    return RunSnapshot(
        name=_printable_line(name),
        history=history,
        state=history.state(now),
        load=loads_of(last_record(history.directory / LOAD_NAME) or {}),
    )


def draw_frame(runs: Sequence[RunSnapshot], screen: Screen) -> list[Text]:
    """Draw at most `screen.height` lines of at most `screen.width` columns."""
    head = _run_header(runs[0], screen) if len(runs) == 1 else _run_table(runs, screen)
    sparks = _sparklines(runs[0], screen) if len(runs) == 1 else []
    rows_of_load = [max((len(each) for each in run.load.values()), default=0) for run in runs]
    most_load = sum(1 + rows for rows in rows_of_load if rows)
    events = _events(runs)
    height = screen.height - len(head)
    chart, sparks_height, load, told = _allocate_rows(
        height,
        [
            (6, max(8, int(0.45 * height))),
            (len(sparks), len(sparks)),
            (min(most_load, 2 * len(runs)), most_load),
            (min(len(events), 2), min(len(events), 6)),
        ],
    )
    lines = [
        *head,
        *_charts(runs, screen, chart),
        *sparks[:sparks_height],
        *_load_blocks(runs, screen, load),
        *(events[-told:] if told else []),
    ]
    for line in lines:
        if screen.ascii_only:
            line.plain = line.plain.encode("ascii", "replace").decode("ascii")
        line.truncate(screen.width, overflow="crop" if screen.ascii_only else "ellipsis")
    return lines[: screen.height]


def _printable_line(text: str) -> str:
    """Replace line breaks and control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _allocate_rows(height: int, wishes: Sequence[tuple[int, int]]) -> list[int]:
    """Allocate rows to parts by their minimum and maximum; the first gets the rest.

    A part whose minimum does not fit gets none.
    """
    given: list[int] = []
    for least, _ in wishes:
        given.append(least if sum(given) + least <= height else 0)
    for number, (least, most) in enumerate(wishes):
        more = min(most - given[number], height - sum(given))
        if given[number] == least and more > 0:
            given[number] += more
    given[0] += max(0, height - sum(given))
    return given


def _run_header(run: RunSnapshot, screen: Screen) -> list[Text]:
    history = run.history
    first = Text.assemble((run.name, f"bold {RUN_STYLES[0]}"), "  ", _state(run))
    if history.unreadable:
        first.append(f"  {history.unreadable} damaged lines", "red")
    return [first, _progress(run, screen), *_wrapped(_numbers(history), screen.width)]


def _state(run: RunSnapshot) -> tuple[str, str]:
    return _printable_line(run.state.text), _STATE_STYLES[run.state.kind]


def _progress(run: RunSnapshot, screen: Screen) -> Text:
    history = run.history
    done, planned = history.iteration, history.train_iters
    if not planned:
        return Text(f"iteration {done:,}")
    share = min(1.0, done / planned)
    before = f"iteration {done:,} of {planned:,} "
    after = f" {share:.0%}"
    left = history.seconds_left()
    if left and run.state.kind == "running":
        after += f", about {duration(left)} of training left"
    columns = screen.width - len(before) - len(after)
    if columns < 5:
        return Text(before.rstrip() + "," + after)
    filled = round(share * columns)
    full, empty = ("#", ".") if screen.ascii_only else ("█", "░")
    return Text.assemble(
        before, (full * filled, "green"), (empty * (columns - filled), "dim"), after
    )


def _numbers(history: RunHistory) -> list[str]:
    """List losses, tokens and other key metrics."""
    steps = history.steps
    told = [f"loss {_decimals(steps.last(history.loss_name))}"]
    results = validation_results(history.evaluations, {})
    told += [f"valid {_printable_line(each.name)} {_decimals(each.last)}" for each in results]
    told.append(f"tokens {_short(steps.last('consumed_tokens'))}")
    for label, key in (("balance", "load_balancing_loss"), ("z-loss", "z_loss")):
        if steps[key]:
            told.append(f"{label} {_decimals(steps.last(key), 3)}")
    if history.skipped:
        told.append(f"skipped {history.skipped}")
    rank, ratio = steps.last("straggler_rank"), steps.last("straggler_ratio")
    if rank is not None and ratio is not None:
        told.append(f"straggler rank {rank:.0f}, busy {ratio:.2f} x the median")
    return told


def _wrapped(parts: Sequence[str], width: int) -> list[Text]:
    """Wrap parts into lines."""
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(lines[-1]) + 3 + cell_len(part) <= width:
            lines[-1] += f"   {part}"
        else:
            lines.append(part)
    return [Text(line) for line in lines]


def _run_table(runs: Sequence[RunSnapshot], screen: Screen) -> list[Text]:
    """Tabulate the runs, a row each; the state comes last and may be cut."""
    rows = [["run", "iteration", "loss", "valid", "tokens/s", "rate", "grad", "left", "state"]]
    for run in runs:
        history, steps = run.history, run.history.steps
        results = validation_results(history.evaluations, {})
        known = [each.last for each in results if each.last is not None]
        share = f" {history.iteration / history.train_iters:.0%}" if history.train_iters else ""
        left = history.seconds_left() if run.state.kind == "running" else None
        rows.append(
            [
                run.name,
                f"{short_number(history.iteration)}{share}",
                _decimals(steps.last(history.loss_name), 3),
                _decimals(sum(known) / len(known) if known else None, 3),
                _short(steps.last("tokens_per_second")),
                _short(steps.last("learning_rate"), ".1e"),
                _decimals(steps.last("grad_norm"), 2),
                duration(left) if left else "-",
                _printable_line(run.state.text),
            ]
        )
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[0] = min(widths[0], max(8, screen.width - sum(widths[1:-1]) - 8 - 7))
    lines = []
    for number, row in enumerate(rows):
        cells = [set_cell_size(cell, w) for cell, w in zip(row, widths, strict=True)]
        style = f"bold {_run_style(number - 1)}" if number else "dim"
        state_style = _STATE_STYLES[runs[number - 1].state.kind] if number else "dim"
        middle = " ".join(cells[1:-1])
        lines.append(
            Text.assemble((cells[0], style), (f" {middle} ", "" if number else "dim")).append(
                cells[-1].rstrip(), state_style
            )
        )
    return lines


def _run_style(number: int) -> str:
    return RUN_STYLES[number % len(RUN_STYLES)]


def _charts(runs: Sequence[RunSnapshot], screen: Screen, height: int) -> list[Text]:
    """Draw the training losses: on shared axes in colour, side by side without."""
    if height < 3:
        return []
    curves = [
        Curve(
            xs=run.history.steps[screen.x],
            ys=run.history.steps[run.history.loss_name],
            style=_run_style(number),
        )
        for number, run in enumerate(runs)
    ]
    curves = [
        each if len(each.xs) == len(each.ys) else Curve(xs=(), ys=(), style=each.style)
        for each in curves
    ]
    unit = _X_UNITS[screen.x]
    what = f"training loss over {unit}, nats per token"
    if len(runs) == 1 or screen.in_colour:
        title = Text(what, "dim")
        return [
            title,
            *draw_curves(
                curves,
                columns=screen.width,
                rows=height - 1,
                x_unit=unit,
                ascii_only=screen.ascii_only,
            ),
        ]
    return _side_by_side(runs, curves, screen, height)


def _side_by_side(
    runs: Sequence[RunSnapshot], curves: Sequence[Curve], screen: Screen, height: int
) -> list[Text]:
    shown = min(len(runs), max(1, screen.width // 26))
    columns = screen.width // shown
    lines = [Text() for _ in range(height)]
    for run, curve in list(zip(runs, curves, strict=True))[:shown]:
        title = Text(f"loss of {run.name}")
        chart = draw_curves(
            [curve],
            columns=columns - 1,
            rows=height - 1,
            x_unit=_X_UNITS[screen.x],
            ascii_only=screen.ascii_only,
        )
        for line, part in zip(lines, [title, *chart], strict=True):
            part.truncate(columns - 1, pad=True)
            line.append_text(part).append(" ")
    return lines


def _sparklines(run: RunSnapshot, screen: Screen) -> list[Text]:
    """Draw learning rate, gradient norm and speed as sparklines with their last values."""
    rows = (
        ("learning rate", "learning_rate", ".3e"),
        ("gradient norm", "grad_norm", ".3f"),
        ("tokens/s", "tokens_per_second", ",.0f"),
    )
    lines = []
    for label, key, form in rows:
        value = run.history.steps.last(key)
        head = f"{label:<14}{'-' if value is None else format(value, form):>10}  "
        bars = sparkline(
            run.history.steps[key], screen.width - len(head), ascii_only=screen.ascii_only
        )
        lines.append(Text.assemble(head, (bars, "cyan")))
    return lines


def _load_blocks(runs: Sequence[RunSnapshot], screen: Screen, height: int) -> list[Text]:
    """Draw the last expert loads of every router type of every run, as far as they fit."""
    blocks = [(run, kind, rows) for run in runs for kind, rows in run.load.items()]
    blocks = blocks[: height // 2]
    lines: list[Text] = []
    for number, (run, kind, rows) in enumerate(blocks):
        share = (height - len(lines)) // (len(blocks) - number)
        strips = _strips(rows, screen, share - 1)
        if strips:
            title = _load_title(run, kind, rows, is_alone=len(runs) == 1)
            lines += [title if lines else title.append_text(_load_legend(screen)), *strips]
    return lines


def _load_title(run: RunSnapshot, kind: str, rows: list[list[float]], *, is_alone: bool) -> Text:
    dead = sum(load == 0 for row in rows for load in row)
    whose = "" if is_alone else f"{run.name} "
    size = f"{len(rows)} x {len(rows[0])}, {dead} dead"
    return Text(f"{whose}{LOAD_TITLES[kind]}, {size}", "dim")


def _load_legend(screen: Screen) -> Text:
    """Explain the colours or shades of the strips."""
    if not screen.in_colour or screen.ascii_only:
        return Text(f"; {shade_legend(ascii_only=screen.ascii_only)}")
    legend = Text("; ", "dim")
    for load, meaning in ((0.0, "none"), (1.0, "even share"), (4.0, "4 x")):
        cell = heat_strip([load], cell_columns=1, in_colour=True, ascii_only=False)
        legend.append_text(cell).append(f" {meaning}  ", "dim")
    return legend


def _strips(rows: list[list[float]], screen: Screen, count: int) -> list[Text]:
    """Draw a strip per layer, with its number and highest load; neighbours share one if needed."""
    if count < 1:
        return []
    groups = group_rows(rows, count)
    names = [str(first) if first == last else f"{first}-{last}" for first, last, _ in groups]
    margin = max(len(name) for name in names)
    columns = max(1, screen.width - margin - 1 - 7)
    strips = []
    for name, (_, _, values) in zip(names, groups, strict=True):
        size = math.ceil(len(values) / columns)
        cells = [max(values[start : start + size]) for start in range(0, len(values), size)]
        strip = heat_strip(
            cells,
            cell_columns=min(3, max(1, columns // len(cells))),
            in_colour=screen.in_colour,
            ascii_only=screen.ascii_only,
        )
        head = (f"{name:>{margin}} ", "dim")
        strips.append(Text.assemble(head, strip, (f" {max(values):.2f}", "dim")))
    return strips


def _events(runs: Sequence[RunSnapshot]) -> list[Text]:
    """List the latest events, the newest last."""
    found = [(run, event) for run in runs for event in run.history.events[-20:]]
    found.sort(key=lambda pair: pair[1].time)
    return [_event_line(run, event, is_alone=len(runs) == 1) for run, event in found]


def _event_line(run: RunSnapshot, event: Event, *, is_alone: bool) -> Text:
    when = _printable_line(event.time.replace("T", " ").removesuffix("Z"))
    whose = "" if is_alone else f"{run.name} "
    return Text.assemble(
        (f"{when} ", "dim"),
        whose,
        (_printable_line(event.name), _EVENT_STYLES.get(event.name, "cyan")),
        f" at {event.iteration:,} ",
        (_printable_line(event.detail), "dim"),
    )


def _decimals(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _short(value: float | None, form: str | None = None) -> str:
    if value is None:
        return "-"
    return short_number(value) if form is None else format(value, form)
