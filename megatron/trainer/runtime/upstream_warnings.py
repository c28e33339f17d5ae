"""Hides notices of torch and megatron-core that a user can do nothing about.

Imports nothing heavy: megatron-core warns when it is imported, so a program hides them before.
"""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

MESSAGES = (
    # At import, four times a process; this project does without both.
    "(Transformer Engine and )?Apex (is|are) not installed",
    # At import of megatron-core 0.19, of a class that nothing here uses.
    "MimoModelConfig is experimental",
    # megatron-core 0.19, of a process that is a rank of nothing, such as a conversion.
    "Could not determine rank from torch.distributed",
    # torch 2.13 renamed collectives that megatron-core calls by their old names.
    ".*(all_gather_into_tensor|reduce_scatter_tensor). is deprecated",
    # torch 2.10's checkpoint writer uses a class that it deprecates itself.
    "TypedStorage is deprecated",
    # torch's checkpoint planner uses a class that it deprecates itself.
    "Please use DTensor instead",
    # torch's NCCL barrier; the device was set before, which is what the notice asks for.
    r"barrier\(\): using the device under current context",
    # torch's first matrix product in the backward pass's thread, which then sets the context.
    "Attempting to run cuBLAS, but there was no current CUDA context",
    # Advice for GPUs before Blackwell, given on CPUs too.
    ".*CUDA_DEVICE_MAX_CONNECTIONS",
)
"""How the warnings begin, as regular expressions."""
LOGGED = {
    # megatron-core 0.19; docs/upstream_faults.md has what it means here.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # The layout that it computes itself is the one it would be given.
    "megatron.core.distributed.distributed_data_parallel": ".*full_param_layout not provided",
    # A CUDA build of torch on a machine without a GPU; doctor and log say which device is used.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}
"""How messages begin that are logged instead, as regular expressions, by logger."""


@contextmanager
def hide_upstream_warnings() -> Iterator[None]:
    """Ignore what begins like one of these, within the context or a decorated call."""
    with warnings.catch_warnings(), ExitStack() as stack:
        for message in MESSAGES:
            warnings.filterwarnings("ignore", message=message)
        for name, message in LOGGED.items():
            stack.enter_context(_hidden(name, re.compile(message)))
        yield


@contextmanager
def _hidden(name: str, message: re.Pattern[str]) -> Iterator[None]:
    """Drop records of one logger."""

    def is_shown(record: logging.LogRecord) -> bool:
        return message.match(record.getMessage()) is None

    logger = logging.getLogger(name)
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)
