"""Record files are cut and searched from their end, against reading them as a whole."""

import json
import math
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.records import record_file
from megatron.trainer.records.record_file import (
    RecordError,
    append_record,
    has_evaluation,
    keep_records_until,
    parse_record,
    read_records,
    scalars,
)

Records = list[dict[str, Any]]


def step(iteration: int, **values: Any) -> dict[str, Any]:
    return {"iteration": iteration, "lm_loss": 5.0 - iteration / 10, **values}


def evaluation(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "valid_loss": {"books": 4.5, "code": 3.25}}


def whole_file(path: Path) -> Records:
    """The records of a file, all of it read at once."""
    found = map(parse_record, path.read_text("utf-8", errors="replace").split("\n"))
    return [record for record in found if record is not None]


def test_unfinished_last_line_is_skipped_and_then_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(path, step(1))
    append_record(path, step(2))
    whole = path.read_text()
    path.write_text(whole[:-9])
    assert [record["iteration"] for record in read_records(path)] == [1]
    assert f"{path}: skipped an unfinished record: " in caplog.text

    keep_records_until(path, 2)
    append_record(path, step(2))
    assert path.read_text() == whole


@pytest.mark.parametrize("unfinished", ['{"iterat', '{"iteration": 2}'])
def test_record_after_an_unfinished_line_starts_a_new_line(unfinished: str, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"  # which is never cut
    append_record(path, step(1))
    with path.open("a") as file:
        file.write(unfinished)
    append_record(path, step(3))
    lines = path.read_text().split("\n")
    assert lines == [json.dumps(step(1)), unfinished, json.dumps(step(3)), ""]


def test_what_json_cannot_hold_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(
        path, {"iteration": 1, "a": math.nan, "b": [1.5, -math.inf], "c": {"d": math.inf}}
    )
    line = path.read_text()
    assert line == '{"iteration": 1, "a": null, "b": [1.5, null], "c": {"d": null}}\n'


def test_scalars_are_the_numbers_by_nested_name() -> None:
    record = {"iteration": 3, "loss": {"books": 1.5, "deep": {"er": 2}}, "list": [1], "ok": True}
    assert scalars(record) == {"iteration": 3.0, "loss/books": 1.5, "loss/deep/er": 2.0}


def random_lines(rng: random.Random) -> list[str]:
    """Lines of a file: records of all lengths and kinds, damaged ones, iterations that may fall."""
    iteration, lines = 0, []
    for _ in range(rng.randrange(40)):
        iteration += rng.choice((0, 0, 1, 1, 2, 10))
        if rng.random() < 0.05:
            iteration -= rng.randrange(iteration + 1)
        line = json.dumps(rng.choice((step, evaluation))(iteration))
        kind = rng.random()
        if kind < 0.1:
            line = line[: rng.randrange(len(line))]
        elif kind < 0.2:
            line = rng.choice(("", "[1]", "null", "\ufffd", '{"iteration": "1"}', "x" * 200))
        elif kind < 0.3:
            line = json.dumps(step(iteration, text="x" * rng.randrange(300)))
        lines.append(line)
    return lines


def cut_whole_file(path: Path, iteration: int) -> str:
    """What a file should hold afterwards: its lines up to the last record of that iteration."""
    lines = path.read_text().splitlines(keepends=True)
    records = [parse_record(line) for line in lines]
    kept = [i for i, r in enumerate(records) if r is not None and r["iteration"] <= iteration]
    return "".join(lines[: kept[-1] + 1]) if kept else ""


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 16])
def test_cutting_and_searching_from_the_end_is_as_reading_the_whole_file(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_file, "_BLOCK_BYTES", block)
    rng, path = random.Random(block), tmp_path / "metrics.jsonl"
    num_ordered = 0
    for _ in range(60):
        text = "\n".join(random_lines(rng)) + rng.choice(("", "\n", "\n\n"))
        path.write_text(text)
        before = whole_file(path)
        assert list(read_records(path)) == before
        iterations = [record["iteration"] for record in before]
        iteration = rng.randrange(max(iterations, default=0) + 3)
        with path.open("rb") as file:
            assert [record for _, record in record_file.read_backwards(file)] == before[::-1]
        expected = cut_whole_file(path, iteration)
        if iterations == sorted(iterations):
            num_ordered += 1
            found = any(r["iteration"] == iteration and "valid_loss" in r for r in before)
            assert has_evaluation(path, iteration) is found
        keep_records_until(path, iteration)
        assert path.read_text() == expected
        if iterations == sorted(iterations):
            assert whole_file(path) == [r for r in before if r["iteration"] <= iteration]
        append_record(path, step(iteration + 1))
        kept = [record for record in map(parse_record, expected.split("\n")) if record]
        assert whole_file(path) == [*kept, step(iteration + 1)]
    assert num_ordered > 10


def test_rewind_that_left_later_records_is_cut_with_them(tmp_path: Path) -> None:
    """Of a run that was killed between going back and cutting, and has gone on since."""
    path = tmp_path / "metrics.jsonl"
    for iteration in (1, 2, 3, 4, 5, 6, 4, 5):
        append_record(path, step(iteration))
    keep_records_until(path, 3)
    assert [record["iteration"] for record in read_records(path)] == [1, 2, 3]


def test_file_is_cut_in_place_and_keeps_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration":  1}\ndamaged\n{"iteration":  2}\n{"iteration":  3}\n')
    inode = path.stat().st_ino
    keep_records_until(path, 2)
    assert path.read_text() == '{"iteration":  1}\ndamaged\n{"iteration":  2}\n'
    assert path.stat().st_ino == inode
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_missing_file_holds_nothing_and_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(read_records(path)) == []
    assert not has_evaluation(path, 1)
    keep_records_until(path, 1)
    assert list(tmp_path.iterdir()) == []


def test_file_that_cannot_be_cut_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    with pytest.raises(RecordError, match=f"cannot write {path}: Is a directory"):
        keep_records_until(path, 1)


def test_line_too_long_for_a_record_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_file, "MAX_LINE_BYTES", 100)
    path = tmp_path / "load.jsonl"
    append_record(path, step(1))
    append_record(path, step(2, load=[1.0] * 100))
    keep_records_until(path, 2)
    assert path.read_text() == json.dumps(step(1)) + "\n"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 MB, in lines as long as the loads of OLMoE-1B-7B."""
    path = tmp_path_factory.mktemp("large") / "expert_load.jsonl"
    with path.open("w") as file:
        for iteration in range(5000):
            file.write(f'{{"iteration": {iteration}, "load": "{"x" * 8000}"}}\n')
    assert path.stat().st_size > 40e6
    return path


def read_all(path: Path) -> None:
    assert sum(1 for _ in read_records(path)) == 5000


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(read_all, id="read"),
        pytest.param(lambda path: has_evaluation(path, 1), id="search"),
        pytest.param(lambda path: keep_records_until(path, 9), id="cut"),
        pytest.param(lambda path: append_record(path, step(10)), id="append"),
    ],
)
def test_memory_does_not_grow_with_the_file(action: Callable[[Path], object], large: Path) -> None:
    tracemalloc.start()
    action(large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_files_of_a_run_can_be_read_without_torch() -> None:
    modules = ("record_file", "run_dir", "history", "thinned_curve")
    names = ", ".join(f"megatron.trainer.records.{name}" for name in modules)
    script = f"import sys, megatron.trainer.hooks.journal, {names}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
