"""Conditions on numbers that lie on a device."""

import torch
from torch import Tensor


def check_on_device(condition: Tensor, message: str) -> None:
    """Refuse numbers for which a condition does not hold.

    Args:
        condition: [] bool.
        message: what is wrong and what to do.

    Raises:
        ValueError: it does not hold; on a GPU a device-side assertion instead, for nothing waits
            for the answer.
    """
    if condition.is_cuda:
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)
