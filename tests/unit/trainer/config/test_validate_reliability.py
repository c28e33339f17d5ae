"""Tests the rules on early exits, bad steps and retention: each message has values and a remedy."""

import dataclasses
from typing import Any

import pytest

from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from moe_app.pretrain.config import PretrainConfig

GOOD: dict[str, Any] = {
    "exit_duration_in_mins": 0.5,
    "exit_interval": 1,
    "requeue_exit_code": 255,
    "max_skipped": 0,
    "spike_sigma": 0.1,
    "spike_window": 1,
    "rewind_on_spike": True,
    "max_rewinds": 0,
    "preflight_timeout": 1.0,
    "save": "runs/a",
    "keep_last": 1,
    "keep_every": 1,
    "profile": True,
    "profile_step_start": 0,
    "profile_step_end": 1,
    "profile_ranks": (0, 3),
}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"exit_duration_in_mins": 0.0}, "exit_duration_in_mins (0) must be above 0; use a positive"),
    ({"spike_sigma": -1.0}, "spike_sigma (-1) must be above 0; use a positive number"),
    ({"preflight_timeout": 0.0}, "preflight_timeout (0) must be above 0; use a positive number"),
    ({"exit_interval": 0}, "exit_interval (0) must be at least 1; use 1 or more"),
    ({"spike_window": 0}, "spike_window (0) must be at least 1; use 1 or more"),
    ({"keep_every": 0}, "keep_every (0) must be at least 1; use 1 or more"),
    ({"max_skipped": -1}, "max_skipped (-1) must be at least 0; use 0 or more"),
    ({"max_rewinds": -1}, "max_rewinds (-1) must be at least 0; use 0 or more"),
    (
        {"requeue_exit_code": 256},
        "requeue_exit_code (256) must be an exit status; use a number from 0 to 255",
    ),
    (
        {"requeue_exit_code": -1},
        "requeue_exit_code (-1) must be an exit status; use a number from 0 to 255",
    ),
    (
        {"save": None},
        "rewind_on_spike (True) needs save (None), the directory of the checkpoints to rewind to"
        "; set --save DIR, or drop --rewind-on-spike",
    ),
    (
        {"keep_last": None},
        "keep_every (1) changes nothing without keep_last (None), which keeps all checkpoints; set"
        " --keep-last N, or drop --keep-every",
    ),
    (
        {"profile_step_end": 0},
        "profile_step_start (0) must be at least 0 and below profile_step_end (0); use"
        " --profile-step-end 1 or more",
    ),
    (
        {"profile_step_start": -1},
        "profile_step_start (-1) must be at least 0 and below profile_step_end (1); use",
    ),
    (
        {"profile_step_start": 100, "profile_step_end": 102},
        "profile_step_start (100) must be below train_iters (100), or nothing is profiled; use an"
        " earlier step",
    ),
    (
        {"profile_ranks": (0, 4)},
        "profile_ranks (0, 4) must name ranks of this run, 0 to 3",
    ),
    ({"profile_ranks": ()}, "profile_ranks () must name ranks of this run, 0 to 3"),
    (
        {"save": None},
        "profile (True) needs save (None), the directory to write to; set --save DIR, or drop"
        " --profile",
    ),
    ({"spike_sigma": float("nan")}, "spike_sigma (nan) must be finite; use an ordinary number"),
]


def config(**changes: Any) -> PretrainConfig:
    cfg = PretrainConfig()
    for group in ("reliability", "checkpoint", "profiling"):
        values = getattr(cfg, group)
        names = {field.name for field in dataclasses.fields(values)}
        mine = {name: value for name, value in changes.items() if name in names}
        cfg = dataclasses.replace(cfg, **{group: dataclasses.replace(values, **mine)})
    return cfg


def test_values_at_the_limits_are_accepted() -> None:
    cfg = config(**GOOD)
    assert cfg.reliability.requeue_exit_code == 255 and cfg.checkpoint.keep_every == 1
    validate(cfg, 4)


@pytest.mark.parametrize(("change", "message"), BAD)
def test_value_beyond_the_limit_is_named_with_rule_and_remedy(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(config(**{**GOOD, **change}), 4)
    assert message in str(caught.value)
