"""A task whose own packages are missing names them, and the remedy."""

import argparse
from typing import Any

import pytest

from megatron.trainer.errors import ConfigError
from moe_app.evaluate.harness import run


def test_missing_package_of_a_task_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise ModuleNotFoundError("No module named 'langdetect'", name="langdetect")

    monkeypatch.setattr(run.lm_eval, "simple_evaluate", fail)
    args = argparse.Namespace(gen_kwargs=None, bootstrap_iters=0, seed=1)
    given: Any = None
    with pytest.raises(ConfigError, match=r"ifeval: .*'langdetect'.*'lm-eval\[ifeval\]'"):
        run._run_tasks(
            given, given, args, {"ifeval": []}, is_chat=True, num_fewshot=None, limit=None
        )
