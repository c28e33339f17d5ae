"""What a run writes down and shows: records, event files, wandb, the progress bar."""

import importlib
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.config.schema import LoggingConfig
from megatron.trainer.errors import ConfigError
from megatron.trainer.hooks.base import (
    Console,
    Hook,
    MetricsFile,
    TensorBoard,
    WeightsAndBiases,
)
from megatron.trainer.records.jsonl import append_record, read_records
from megatron.trainer.runtime.log import configure_logging
from tests.paths import REPO


def step_record(iteration: int, **values: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "lm_loss": 5.0 - iteration / 10,
        "grad_norm": 1.25,
        "learning_rate": 4e-4,
        "tokens_per_second": 12345.6,
        "skipped": 0,
        **values,
    }


def evaluation(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "valid_loss": {"books": 4.5, "code": 3.25}}


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [step_record(1, per_layer=[0.1, 1 / 3]), evaluation(1), step_record(2)]
    hook = MetricsFile(path)
    hook.on_start(0, 10)
    hook.on_log(records[0])
    hook.on_evaluation(records[1])
    hook.on_log(records[2])
    assert list(read_records(path)) == records
    assert [json.loads(line) for line in path.read_text().splitlines()] == records


def test_resumed_run_drops_the_records_that_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for iteration in range(1, 7):
        append_record(path, step_record(iteration))
        append_record(path, evaluation(iteration))
    MetricsFile(path).on_start(4, 10)
    assert [record["iteration"] for record in read_records(path)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(path, step_record(1))
    MetricsFile(path).on_start(0, 10)
    assert path.read_text() == ""


def test_run_without_records_starts_without_a_file(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").on_start(3, 10)
    assert list(read_records(tmp_path / "metrics.jsonl")) == []


def test_tensorboard_can_read_every_number_back(tmp_path: Path) -> None:
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    hook = TensorBoard(tmp_path)
    hook.on_start(0, 2)
    for iteration in (1, 2):
        hook.on_log(step_record(iteration, layer_entropy=[1.0, 2.0]))
    hook.on_evaluation(evaluation(2))
    hook.on_end()

    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    numbers = set(step_record(1)) - {"iteration"}
    assert set(events.Tags()["scalars"]) == numbers | {"valid_loss/books", "valid_loss/code"}
    losses = [(event.step, event.value) for event in events.Scalars("lm_loss")]
    assert losses == [(1, pytest.approx(4.9)), (2, pytest.approx(4.8))]
    assert [(e.step, e.value) for e in events.Scalars("valid_loss/books")] == [(2, 4.5)]


WANDB_PROGRAM = """
import sys
from pathlib import Path
from megatron.trainer.config.schema import LoggingConfig
from megatron.trainer.hooks.base import WeightsAndBiases
for iteration in (1, 2):
    hook = WeightsAndBiases(LoggingConfig(wandb_project="p"), Path(sys.argv[1]), {"lr": 1})
    hook.on_log({"iteration": iteration, "lm_loss": 4.0})
    hook.on_evaluation({"iteration": iteration, "valid_loss": {"books": 4.5}})
    hook.on_end()
"""


def wandb_environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return {**kept, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}


def test_wandb_run_keeps_its_id_over_two_starts(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    done = subprocess.run(
        [sys.executable, "-c", WANDB_PROGRAM, str(tmp_path)],
        cwd=REPO,
        env=wandb_environment(),
        check=False,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert re.fullmatch(r"[0-9a-f]{12}", run_id)
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) >= 1
    assert {name.rsplit("-", 1)[1] for name in runs} == {run_id}


def test_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = (
        "wandb_project is 'p', but wandb is not installed; install the extra: pip install -e"
        " '.[wandb]', or leave --wandb-project away"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        WeightsAndBiases(LoggingConfig(wandb_project="p"), tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_a_login_is_a_message_and_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="the wandb extra is not installed")

    def refuse(**_settings: object) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    message = (
        "wandb did not start: No API key configured. Use `wandb login` to log in.; log in, set"
        " WANDB_MODE=offline, or leave --wandb-project away"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        WeightsAndBiases(LoggingConfig(wandb_project="p"), tmp_path, {})


class Terminal:
    """A pseudo terminal as standard error, and what was written to it."""

    def __init__(self) -> None:
        self._reader, writer = pty.openpty()
        os.set_blocking(self._reader, False)
        self.file = os.fdopen(writer, "w", encoding="utf-8")
        self._text = ""

    def text(self) -> str:
        """All that was written so far, without colours and cursor movements."""
        self.file.flush()
        while True:
            try:
                self._text += os.read(self._reader, 1 << 16).decode()
            except BlockingIOError:
                return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._text)

    def close(self) -> None:
        self.file.close()
        os.close(self._reader)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    found = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    yield found
    found.close()


def test_progress_bar_shows_step_loss_and_speed_on_a_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.file)
    hook = Console(progress=True)
    hook.on_start(2, 8)
    for iteration in range(3, 9):
        hook.on_step(iteration, 5.0 - iteration / 10)
        hook.on_log(step_record(iteration))
        terminal.text()  # a full buffer would block the bar
    hook.on_end()
    last = terminal.text().rstrip().splitlines()[-1]
    assert re.search(r"training .+ 8/8 loss 4\.2000 12,346 tokens/s 0:00:0\d", last), last


def test_progress_bar_is_gone_when_it_is_switched_off(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.file)
    hook = Console(progress=False)
    hook.on_start(0, 2)
    hook.on_step(1, 5.0)
    hook.on_end()
    assert terminal.text() == ""


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_log_lines_stand_above_the_progress_bar(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, root_logger: logging.Logger
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.file)
    configure_logging(0)
    hook = Console(progress=True)
    hook.on_start(0, 8)
    root_logger.info("saved run/iter_0000001")
    hook.on_evaluation(evaluation(1))
    hook.on_end()
    root_logger.info("the end")
    lines = [line.rstrip().rpartition("\r")[2] for line in terminal.text().split("\n")]
    for said in (
        "saved run/iter_0000001",
        "iteration 1 | validation loss: books 4.5000, code 3.2500",
        "the end",
    ):
        assert any(re.fullmatch(rf"\d\d:\d\d:\d\d {re.escape(said)}", line) for line in lines), (
            lines
        )


def test_away_from_a_terminal_each_record_is_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    caplog.set_level(logging.INFO, logger="megatron.trainer.hooks.base")
    hook = Console(progress=True)
    hook.on_start(0, 8)
    hook.on_step(1, 4.9)
    hook.on_log(step_record(1))
    hook.on_log(step_record(2, load_balancing_loss=1.0625, z_loss=3.5))
    hook.on_evaluation(evaluation(2))
    hook.on_end()
    assert caplog.messages == [
        "iteration 1/8 | loss 4.9000 | grad norm 1.250 | lr 4.000e-04 | 12,346 tokens/s",
        "iteration 2/8 | loss 4.8000 | balance 1.062 | z 3.50 | grad norm 1.250 | lr 4.000e-04"
        " | 12,346 tokens/s",
        "iteration 2 | validation loss: books 4.5000, code 3.2500",
    ]
    assert stderr.getvalue() == ""


def test_a_hook_may_leave_every_moment_as_it_is() -> None:
    hook = Hook()
    hook.on_start(0, 1)
    hook.on_step(1, 1.0)
    hook.on_log({})
    hook.on_evaluation({})
    hook.on_end()
