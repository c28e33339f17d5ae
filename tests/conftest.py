"""What every test leaves behind is taken away here."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_logging_left() -> Iterator[None]:
    """Tools that are run in this process set up logging for good; the next test has its own."""
    yield
    root = logging.getLogger()
    root.handlers[:] = [each for each in root.handlers if type(each).__name__ != "_StderrHandler"]
