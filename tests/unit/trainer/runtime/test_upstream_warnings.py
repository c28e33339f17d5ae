"""Check which notices of torch and megatron-core are hidden, and for how long."""

import logging
import warnings

import pytest

from megatron.trainer.runtime.upstream_warnings import LOGGED, hide_upstream_warnings

LOGGER = "megatron.core.models.gpt.gpt_model"


def test_only_the_known_notices_are_hidden_and_only_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    notice, other = "GPTModel IS DEPRECATED. Please", "GPTModel has a problem"
    logger = logging.getLogger(LOGGER)
    assert LOGGER in LOGGED
    with hide_upstream_warnings():
        logger.warning(notice)
        logger.warning(other)
        logging.getLogger("megatron.core").warning(notice)
    logger.warning("%s IS DEPRECATED", "GPTModel")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        (LOGGER, other),
        ("megatron.core", notice),
        (LOGGER, "GPTModel IS DEPRECATED"),
    ]


def test_filters_are_gone_after_an_error() -> None:
    logger = logging.getLogger(LOGGER)
    before = list(logger.filters)
    with pytest.raises(KeyError), hide_upstream_warnings():
        assert len(logger.filters) == len(before) + 1
        raise KeyError
    assert logger.filters == before


def test_warnings_are_hidden_by_how_they_begin() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with hide_upstream_warnings():
            warnings.warn("MimoModelConfig is experimental and still", stacklevel=1)
            warnings.warn("this MimoModelConfig is experimental", stacklevel=1)
            warnings.warn("barrier(): using the device under current context. You", stacklevel=1)
        warnings.warn("MimoModelConfig is experimental and still", stacklevel=1)
    assert [str(each.message) for each in seen] == [
        "this MimoModelConfig is experimental",
        "MimoModelConfig is experimental and still",
    ]
