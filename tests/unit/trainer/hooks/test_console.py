"""What a run shows: the progress bar, or lines of a log."""

import io
import logging
import os
import pty
import re
import sys
from collections.abc import Iterator

import pytest

from megatron.trainer.hooks.base import Hook
from megatron.trainer.hooks.console import Console
from megatron.trainer.runtime.log import configure_logging
from tests.unit.trainer.hooks.record_samples import evaluation, step_record


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
    caplog.set_level(logging.INFO, logger="megatron.trainer.hooks.console")
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


def test_hook_need_not_override_anything() -> None:
    hook = Hook()
    hook.on_start(0, 1)
    hook.on_step(1, 1.0)
    hook.on_log({})
    hook.on_evaluation({})
    hook.on_end()
