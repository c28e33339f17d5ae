"""Signals that ask a run to stop are recorded, once it listens for them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron.trainer.runtime import signals


@pytest.fixture(autouse=True)
def no_listening() -> Iterator[None]:
    yield
    signals.stop_listening()


@pytest.mark.parametrize("notice", signals.STOP_SIGNALS)
def test_signal_is_recorded_once_listened_for(notice: signal.Signals) -> None:
    before = signal.getsignal(notice)
    signals.listen()
    signals.listen()
    assert signals.received() is None
    os.kill(os.getpid(), notice)
    assert signals.received() == notice
    signals.stop_listening()
    assert signals.received() is None
    assert signal.getsignal(notice) == before


def test_first_signal_is_the_one_returned() -> None:
    signals.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received() == signal.SIGUSR1


def test_signal_received_before_the_flag_was_read_kills_without_the_handler() -> None:
    script = (
        "import os, signal\nfrom megatron.trainer.runtime import signals\nsignals.listen()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\nprint('alive', flush=True)\n"
        "signals.stop_deferring()\nprint('dead')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGUSR1, "alive\n")


def test_signals_can_be_listened_for_before_anything_heavy_is_imported() -> None:
    script = (
        "import sys\nfrom megatron.trainer.runtime import signals\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
