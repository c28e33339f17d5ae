"""Run directories read while they are written, cut and damaged."""

import itertools
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.errors import ConfigError
from megatron.trainer.records.history import RunHistory, duration, thin
from megatron.trainer.records.record_file import append_record, keep_records_until, read_records
from megatron.trainer.records.run_dir import (
    RecordTail,
    check_run,
    last_record,
    loads_of,
    read_settings,
    run_names,
    sample_records,
    spread,
)

Write = Callable[[Path], None]


def step(iteration: int, **values: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "consumed_tokens": 64 * iteration,
        "lm_loss": 5.0 - iteration / 100,
        "tokens_per_second": 32.0,
        "skipped": 0,
        **values,
    }


def make_run(folder: Path, records: list[dict[str, Any]], settings: str = "") -> Path:
    folder.mkdir()
    text = "train_iters: 100\nlog_interval: 10\nglobal_batch_size: 4\nseq_length: 16\n"
    (folder / "config.yaml").write_text(text + settings)
    for record in records:
        append_record(folder / "metrics.jsonl", record)
    return folder


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_tail_yields_every_record_once_however_the_file_grows(tmp_path: Path) -> None:
    path, random_ = tmp_path / "metrics.jsonl", random.Random(1)
    written = lines(*(step(i, text="ü" * random_.randrange(300)) for i in range(60))).encode()
    tail, found = RecordTail(path), list[Any]()
    with path.open("ab", buffering=0) as file:
        while written:
            size = random_.randrange(1, 900)
            file.write(written[:size])
            written = written[size:]
            starts_over, records = tail.read_new()
            assert not starts_over
            found += records
    assert found == list(read_records(path))
    assert len(found) == 60


def cut_by_a_resume(path: Path) -> None:
    keep_records_until(path, 4)


def cut_and_grown_beyond(path: Path) -> None:
    keep_records_until(path, 4)
    for iteration in range(5, 30):
        append_record(path, step(iteration, lm_loss=1.0))


def written_again_in_place(path: Path) -> None:
    path.write_text(lines(*(step(i, lm_loss=2.0) for i in range(40))))


def emptied(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize(
    "change", [cut_by_a_resume, cut_and_grown_beyond, written_again_in_place, emptied, os.unlink]
)
def test_tail_starts_over_when_what_it_read_is_gone(tmp_path: Path, change: Write) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(*(step(i) for i in range(10))))
    tail = RecordTail(path)
    assert len(list(tail.read_new()[1])) == 10
    change(path)
    starts_over, records = tail.read_new()
    assert starts_over
    assert list(records) == list(read_records(path))
    append_record(path, step(90))
    assert [record["iteration"] for record in tail.read_new()[1]] == [90]


DAMAGED = [
    b"{",
    b"[1]",
    b"\xff\xfe",
    b'{"lm_loss": 1}',
    b'{"iteration": "3"}',
    b'{"iteration": 1%s}' % (b"0" * 400),
    b'{"iteration": 1%s}' % (b"0" * 5000),
    b'{"iteration": 1, "a": ' + b"[" * 100_000,
]


def test_damaged_lines_are_counted_and_skipped(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", []) / "metrics.jsonl"
    too_large = b'{"iteration": 9, "lm_loss": 1%s}' % (b"0" * 400)
    good = lines(step(10)).encode()
    path.write_bytes(good + b"\n".join([*DAMAGED, too_large]) + b"\n" + lines(step(20)).encode())
    history = RunHistory(path.parent)
    assert list(history.steps["iteration"]) == [10, 20]
    assert history.unreadable == len(DAMAGED) + 1


def test_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(OSError, match="it is not a regular file"):
        RunHistory(run)
    with pytest.raises(OSError, match="it is not a regular file"):
        last_record(run / "metrics.jsonl")
    os.mkfifo(run / "ended.json")
    (run / "metrics.jsonl").unlink()
    assert RunHistory(run).state(0.0).text == "ended: unknown: ended.json cannot be read"


def test_last_record_is_the_last_valid_one(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    assert last_record(path) is None
    path.write_text("")
    assert last_record(path) is None
    path.write_text('{"iteration": 1')
    assert last_record(path) is None
    # Lines shorter and longer than a block, and one that ends at a block's border.
    for size in (10, 1 << 16, (1 << 16) - 32, 300_000):
        path.write_text(lines(step(1), step(2, text="x" * size)))
        assert last_record(path) == list(read_records(path))[-1]
        with path.open("a") as file:
            file.write('{"iteration": 3, "lm')
        found = last_record(path)
        assert found is not None and found["iteration"] == 2


def test_sampled_records_are_spread_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    assert sample_records(path, 3) == ([], 0)
    path.write_text(lines(*(step(i) for i in range(11))) + '{"iteration": 11')
    for count in (2, 3, 5, 10):
        records, total = sample_records(path, count)
        found = [record["iteration"] for record in records]
        assert total == 11 and len(found) == count
        assert found[0] == 0 and found[-1] == 10
        gaps = [after - before for before, after in itertools.pairwise(found)]
        assert max(gaps) - min(gaps) <= 1
    assert [record["iteration"] for record in sample_records(path, 50)[0]] == list(range(11))
    assert spread(3, 3) == [0, 1, 2]


def test_thin_keeps_ends_extremes_and_gaps() -> None:
    random_ = random.Random(2)
    values = [random_.gauss(0, 1) for _ in range(5000)]
    values[1234], values[4000], values[3333] = 40.0, -40.0, math.nan
    kept = thin(values, 302)
    assert len(kept) <= 302 and kept == sorted(set(kept))
    assert {0, 4999, 1234, 4000, 3333} <= set(kept)
    # 100 stretches of 50: in each the extremes by looking.
    for start in range(0, 5000, 50):
        part = [value for value in values[start : start + 50] if not math.isnan(value)]
        found = [values[index] for index in kept if start <= index < start + 50]
        assert {min(part), max(part)} <= set(found)
    assert thin(values[:302], 302) == list(range(302))


def test_columns_hold_the_numbers_of_the_records(tmp_path: Path) -> None:
    records = [
        step(10, consumed_tokens_per_source={"code": 7}, phase="stable", per_layer=[1.0, 2.5]),
        {"iteration": 10, "valid_loss": {"code": 3.5, "docs": None}},
        step(20, lm_loss=None, phase="stable", grad_norm=0.5, per_layer=[3.0, None]),
        step(30, phase="anneal", skipped=1),
        {"iteration": 30, "valid_loss": {"code": "3", "docs": 2.0}},
    ]
    history = RunHistory(make_run(tmp_path / "run", records), layer_keys=("per_layer",))
    steps = [record for record in records if "lm_loss" in record]
    for key in ("iteration", "consumed_tokens", "lm_loss", "grad_norm", "skipped"):
        expected = [record.get(key) for record in steps]
        found = [None if math.isnan(value) else value for value in history.steps[key]]
        assert found == expected, key
    assert next(iter(history.steps["consumed_tokens_per_source/code"])) == 7
    assert list(history.steps["no such name"]) == []
    assert [record["valid_loss"] for record in history.evaluations] == [
        {"code": 3.5, "docs": None},
        {"code": None, "docs": 2.0},
    ]
    assert history.phases == [(0, "stable"), (2, "anneal")]
    first, second, third = (list(row) for row in history.layers["per_layer"])
    assert first == [1.0, 2.5] and third == []
    assert second[0] == 3.0 and math.isnan(second[1])
    assert (history.iteration, history.train_iters, history.skipped) == (30, 100, 1)


def test_refresh_reads_new_records_and_drops_those_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [step(10), step(20)])
    history = RunHistory(run)
    append_record(run / "metrics.jsonl", step(30))
    append_record(run / "events.jsonl", {"iteration": 30, "event": "save", "detail": "x"})
    history.refresh()
    assert list(history.steps["iteration"]) == [10, 20, 30]
    assert [(event.iteration, event.name, event.time) for event in history.events] == [
        (30, "save", "")
    ]
    keep_records_until(run / "metrics.jsonl", 10)
    append_record(run / "metrics.jsonl", step(20, lm_loss=1.0))
    history.refresh()
    assert list(history.steps["lm_loss"]) == [4.9, 1.0]
    assert len(history.events) == 1


def test_settings_follow_a_run_that_starts_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    history = RunHistory(run)
    config = run / "config.yaml"
    config.write_text("train_iters: 200\ndata_path: [0.")  # half written
    history.refresh()
    assert history.train_iters == 100
    config.write_text("train_iters: 200\n")
    history.refresh()
    assert history.train_iters == 200


def test_times_follow_from_speed_and_batch(tmp_path: Path) -> None:
    # 4 x 16 tokens a step; at 32, 64, 128 tokens/s that is 2, 1, 0.5 seconds.
    records = [
        step(10, tokens_per_second=32.0),
        step(20, tokens_per_second=64.0),
        step(30, tokens_per_second=128.0),
    ]
    history = RunHistory(make_run(tmp_path / "run", records))
    assert history.seconds_per_step() == 1.0
    assert history.seconds_left() == 70.0
    assert history.training_seconds() == 10 * 2 + 10 * 1 + 10 * 0.5
    unknown = make_run(tmp_path / "unknown", records)
    (unknown / "config.yaml").write_text("train_iters: many\n")
    history = RunHistory(unknown)
    assert (history.seconds_per_step(), history.seconds_left(), history.training_seconds()) == (
        None,
        None,
        None,
    )


def set_back(run: Path, seconds: float, now: float) -> None:
    for path in (*run.iterdir(), run):
        os.utime(path, (now - seconds, now - seconds))


def test_state_says_whether_a_run_goes_on(tmp_path: Path) -> None:
    now = 1_800_000_000.0
    run = make_run(tmp_path / "run", [])
    set_back(run, 5, now)
    assert RunHistory(run).state(now).kind == "starting"

    append_record(run / "metrics.jsonl", step(10))  # every 10 steps of 2 seconds
    set_back(run, 110, now)
    assert RunHistory(run).state(now).text == "running"
    set_back(run, 130, now)
    silent = RunHistory(run).state(now)
    assert (silent.kind, silent.text, silent.is_over) == ("silent", "silent for 2 min", False)
    # A checkpoint that is being written is a sign of life.
    (run / "iter_0000010.tmp-x").mkdir()
    os.utime(run / "iter_0000010.tmp-x", (now, now))
    assert RunHistory(run).state(now).kind == "running"

    # Slow steps: a record every 10 x 64 seconds.
    append_record(run / "metrics.jsonl", step(20, tokens_per_second=1.0))
    append_record(run / "metrics.jsonl", step(30, tokens_per_second=1.0))
    set_back(run, 3000, now)
    assert RunHistory(run).state(now).kind == "running"
    append_record(run / "metrics.jsonl", step(100, tokens_per_second=1.0))
    set_back(run, 86400, now)
    done = RunHistory(run).state(now)
    assert (done.kind, done.text, done.is_over) == ("ended", "all steps done", True)


@pytest.mark.parametrize(
    ("told", "text", "is_over"),
    [
        ('{"reason": "finished", "detail": "", "requeue": false}', "ended: finished", True),
        (
            '{"reason": "signal", "detail": "SIGUSR1 received", "requeue": true}',
            "ended: signal: SIGUSR1 received, to be started again",
            False,
        ),
        ('{"reason": "error", "detail": "no room"}', "ended: error: no room", True),
        ("{", "ended: unknown: ended.json cannot be read", True),
        ('["finished"]', "ended: unknown: ended.json cannot be read", True),
    ],
)
def test_state_says_how_a_run_ended(tmp_path: Path, told: str, text: str, is_over: bool) -> None:
    run = make_run(tmp_path / "run", [step(10)])
    (run / "ended.json").write_text(told)
    state = RunHistory(run).state(0.0)
    assert (state.kind, state.text, state.is_over) == ("ended", text, is_over)


def test_settings_are_read_as_text_and_nothing_is_built_from_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], "lr: 4e-4\nfrom_another_version: [a b, {x: 0.3}]\n")
    settings = read_settings(run)
    assert settings["lr"] == "4e-4"
    assert settings["from_another_version"] == "[a b, {x: 0.3}]"
    (run / "config.yaml").write_text("a: !!python/object/apply:os.system ['touch here']\n")
    assert "touch here" in read_settings(run)["a"]
    (run / "config.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        RunHistory(run)


def test_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        check_run(tmp_path, given_as="RUN")
    assert str(error.value) == (
        f"{tmp_path} holds no config.yaml; RUN must be the --save directory of a run; check the"
        " path"
    )


def test_run_names_are_the_shortest_that_differ(tmp_path: Path) -> None:
    a, b, c = tmp_path / "x/run", tmp_path / "y/run", tmp_path / "z/other"
    assert run_names([a, c]) == ["run", "other"]
    assert run_names([a, b, c]) == ["x/run", "y/run", "other"]
    assert run_names([tmp_path / os.fsdecode(b"a\xff")]) == ["a\ufffd"]
    with pytest.raises(ConfigError, match=r"run is given twice"):
        run_names([a, c, tmp_path / "z/../x/run"])


def test_loads_are_matrices_or_nothing() -> None:
    good = [[1.0, 0.5], [2, 0]]
    assert loads_of({"load": good, "moa_load": [[1.0], [1.0, 2.0]]}) == {"load": good}
    bad: list[Any] = [None, 3, [], [[]], [[None]], [["x"]], [[math.nan]], [[10**400]], [3]]
    assert [loads_of({"load": each}) for each in bad] == [{}] * len(bad)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3569, "59 min"),
        (3599, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86399, "1 d 0 h"),
        (180000, "2 d 2 h"),
        (-5, "0 s"),
    ],
)
def test_durations_have_the_units_that_matter(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_end_of_a_run_is_what_its_last_job_says_and_steps_have_their_own_batches(
    tmp_path: Path,
) -> None:
    """Settings say 100 steps of 4 x 16 tokens; batches of 8 make 60 of them, 30 to come."""
    records = [
        step(10, global_batch_size=4, consumed_tokens=640, tokens_per_second=32.0),
        step(20, global_batch_size=4, consumed_tokens=1_280, tokens_per_second=32.0),
        step(30, global_batch_size=8, consumed_tokens=2_560, tokens_per_second=32.0),
    ]
    run = make_run(tmp_path / "run", records)
    history = RunHistory(run)
    assert history.train_iters == 100
    for planned in ({}, {"train_iters": 60, "train_tokens": 6_400}, {"train_iters": "1"}):
        event = {"iteration": 20, "event": "resume", "time": "", "detail": "", **planned}
        append_record(run / "events.jsonl", event)
    history.refresh()
    assert history.train_iters == 60
    assert history.seconds_per_step() == 128 / 32
    assert history.seconds_left() == (6_400 - 2_560) / 32
    assert history.training_seconds() == (640 + 640 + 1_280) / 32
