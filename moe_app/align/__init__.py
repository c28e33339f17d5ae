"""Aligns a model with preferences: DPO and KTO against a frozen reference."""

from collections.abc import Sequence

from megatron.trainer.runtime import signals
from megatron.trainer.runtime.upstream_warnings import hide_upstream_warnings


@hide_upstream_warnings()
def start(argv: Sequence[str] | None = None) -> int:
    """Listen for signals, then import the command, which takes seconds, and run it."""
    signals.listen()
    try:
        from moe_app.align.alignment import main

        return main(argv)
    finally:
        signals.stop_listening()
