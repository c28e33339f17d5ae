"""Fine-tunes a model on conversations; what alignment shares with it is here too."""

from collections.abc import Sequence

from megatron.trainer.runtime import signals
from megatron.trainer.runtime.upstream_warnings import hide_upstream_warnings


@hide_upstream_warnings()
def start(argv: Sequence[str] | None = None) -> int:
    """Listen for signals, then import the command, which takes seconds, and run it."""
    signals.listen()
    try:
        from moe_app.finetune.finetuning import main

        return main(argv)
    finally:
        signals.stop_listening()
