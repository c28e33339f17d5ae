"""Hides warnings of torch and megatron-core that a user can do nothing about.

Imports nothing heavy: megatron-core warns when it is imported, so a program hides them before.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

MESSAGES = (
    # At import, four times a process; this project does without both.
    "(Transformer Engine and )?Apex (is|are) not installed",
    # torch 2.13 renamed collectives that megatron-core 0.16 calls by their old names.
    ".*(all_gather_into_tensor|reduce_scatter_tensor). is deprecated",
    # torch's checkpoint planner uses a class that it deprecates itself.
    "Please use DTensor instead",
    # Advice for GPUs before Blackwell, given on CPUs too.
    ".*CUDA_DEVICE_MAX_CONNECTIONS",
)
"""How the warnings begin, as regular expressions."""


@contextmanager
def hide_upstream_warnings() -> Iterator[None]:
    """Ignore warnings that begin with one of `MESSAGES`, within the context or a decorated call."""
    with warnings.catch_warnings():
        for message in MESSAGES:
            warnings.filterwarnings("ignore", message=message)
        yield
