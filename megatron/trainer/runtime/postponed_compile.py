"""Keeps imports of megatron-core from loading torch's compiler, which takes over a second."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def postponed_compile() -> Iterator[None]:
    """Let a decoration by `torch.compile` load the compiler only when its function is called.

    megatron-core decorates some thirty functions when it is imported, whether or not they are
    ever called. They compile at their first call with and without this.
    """
    import torch

    original = torch.compile

    def postponed(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(postponed, **options)
        return _compiled_when_called(original, model, options)

    torch.compile = postponed
    try:
        yield
    finally:
        torch.compile = original


def _compiled_when_called(
    compile_: Callable[..., Any], function: Callable[..., Any], options: dict[str, Any]
) -> Callable[..., Any]:
    """Return a function that replaces itself by its compiled form at the first call."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        done: Callable[..., Any] = compile_(function, **options)
        return done

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call
