"""Pretrains: config of a run, its state, hooks and command.

The loop, the step and checkpoints are in `megatron.trainer`.
"""

from collections.abc import Sequence

from megatron.trainer.runtime import signals
from megatron.trainer.runtime.postponed_compile import postponed_compile
from megatron.trainer.runtime.upstream_warnings import hide_upstream_warnings


@hide_upstream_warnings()
def start(argv: Sequence[str] | None = None) -> int:
    """Listen for signals, then import the command, which takes seconds, and run it."""
    signals.listen()
    try:
        with postponed_compile():
            from moe_app.pretrain.command import main

        return main(argv)
    finally:
        signals.stop_listening()
