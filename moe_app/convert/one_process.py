"""Run what writes a checkpoint in one process, and end it cleanly when it is interrupted."""

import signal
import sys
from collections.abc import Callable

from megatron.trainer.errors import ConfigError
from megatron.trainer.runtime.launch import environment_world_size, run_main

_INTERRUPTED = 130


def run_interruptible(action: Callable[[], int]) -> int:
    """Run a command, for which SIGTERM is what Ctrl-C is; return the exit status."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run_main(action)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; unfinished output has been removed\n")
        return _INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def check_one_process(work: str) -> None:
    """Refuse to run under torchrun with several processes.

    Args:
        work: what runs, for the message.

    Raises:
        ConfigError: there are several.
    """
    if environment_world_size() != 1:
        raise ConfigError(
            f"torchrun started {environment_world_size()} processes; {work} runs in one;"
            " start the tool without torchrun"
        )


def _interrupt(*_: object) -> None:
    """Treat SIGTERM as Ctrl-C."""
    raise KeyboardInterrupt
