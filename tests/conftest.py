"""What every test leaves behind is taken away here."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.trainer.hooks import plots
from tests.undrawn import write_no_pixels

if not torch.cuda.is_available():
    # Triton asks when it is imported: without a GPU its kernels are tested in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def write_figure() -> Iterator[Callable[[Any, Path], None]]:
    """Return what writes plots, and leave their pixels out of tests that do not ask for them."""
    real = plots.write_figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "write_figure", write_no_pixels)
        yield real


@pytest.fixture
def with_pixels(write_figure: Callable[[Any, Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have plots drawn in this test."""
    monkeypatch.setattr(plots, "write_figure", write_figure)


@pytest.fixture(autouse=True)
def no_logging_left() -> Iterator[None]:
    """Tools that are run in this process set up logging for good; the next test has its own."""
    yield
    root = logging.getLogger()
    root.handlers[:] = [each for each in root.handlers if type(each).__name__ != "_StderrHandler"]
