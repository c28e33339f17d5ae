"""Pretrains: config of a run, its state, hooks and command.

The loop, the step and checkpoints are in `megatron.trainer`.
"""

from collections.abc import Sequence

from moe_app.start_command import Main, start_command


def start(argv: Sequence[str] | None = None) -> int:
    """Run the command; signals are heard before the imports, which take seconds."""
    return start_command(_load, argv)


def _load() -> Main:
    from moe_app.pretrain.command import main

    return main
