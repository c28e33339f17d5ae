"""Starts the commands that train: pretraining, fine-tuning and alignment."""

from collections.abc import Callable, Sequence

from megatron.trainer.runtime import signals
from megatron.trainer.runtime.postponed_compile import postponed_compile
from megatron.trainer.runtime.upstream_warnings import hide_upstream_warnings

Main = Callable[[Sequence[str] | None], int]


@hide_upstream_warnings()
def start_command(load: Callable[[], Main], argv: Sequence[str] | None = None) -> int:
    """Listen for signals, then import a command, which takes seconds, and run it.

    Args:
        load: imports the command and returns it.
        argv: its arguments; None takes those of this process.
    """
    signals.listen()
    try:
        with postponed_compile():
            main = load()
        return main(argv)
    finally:
        signals.stop_listening()
