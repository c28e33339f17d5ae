"""Records as a run writes them."""

from typing import Any


def step_record(iteration: int, **values: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "lm_loss": 5.0 - iteration / 10,
        "grad_norm": 1.25,
        "learning_rate": 4e-4,
        "tokens_per_second": 12345.6,
        "skipped": 0,
        **values,
    }


def evaluation(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "valid_loss": {"books": 4.5, "code": 3.25}}
