"""Skips GPU tests, with the reason, where there is no GPU; names the notices of torch on one."""

import pytest
import torch

NOTICES = (
    # The trainer sets the device before, and hides the notice in a run; a test of a part does not.
    r"ignore:barrier\(\). using the device under current context",
    # In the first matrix product of a backward pass, whose thread has no context before.
    "ignore:Attempting to run cuBLAS, but there was no current CUDA context",
)
"""Warnings that torch gives on a GPU alone; all others are errors, as in every test."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = f"torch {torch.__version__} sees no GPU"
    for item in items:
        if item.get_closest_marker("gpu") is None:
            continue
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=reason))
        for notice in NOTICES:
            item.add_marker(pytest.mark.filterwarnings(notice))
