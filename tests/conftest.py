"""What every test leaves behind is taken away here."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton asks when it is imported: without a GPU its kernels are tested in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def no_logging_left() -> Iterator[None]:
    """Tools that are run in this process set up logging for good; the next test has its own."""
    yield
    root = logging.getLogger()
    root.handlers[:] = [each for each in root.handlers if type(each).__name__ != "_StderrHandler"]
