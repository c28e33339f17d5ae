"""Checks that tasks have what they need before the model answers, which may take hours."""

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string

from megatron.trainer.errors import ConfigError
from moe_app.evaluate.harness.model import HarnessModel

_SENTENCES = "tokenizers/punkt_tab/english/"
"""What nltk splits English sentences with."""


LoadedTasks = dict[str, list[Task | Group]]
"""What tasks, groups and tags are made of, with their data, by name."""


def load_tasks(
    model: HarnessModel,
    manager: TaskManager,
    tasks: Sequence[str],
    gen_kwargs: str | None,
    *,
    seed: int,
) -> LoadedTasks:
    """Load each task with its data, and refuse what the harness would stumble over later.

    The harness loads tasks that are evaluated with other examples or limits after the answers to
    the first, and asks for data of nltk when it scores.

    Args:
        model: will answer.
        manager: finds the tasks.
        tasks: names of tasks, groups or tags.
        gen_kwargs: settings of generation, over the tasks' own, as the command line has them.
        seed: of what a task draws as it loads its data, whatever name was loaded before; tasks of
            a group draw one after another.

    Returns:
        What the harness evaluates in place of the names, so that it loads nothing again.

    Raises:
        UserError: a package or data are not there, or the model is too short for the answers.
    """
    given = simple_parse_args_string(gen_kwargs or "")
    loaded: LoadedTasks = {}
    for name in tasks:
        with explained([name]):
            # As the harness does before it loads tasks.
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            found: Mapping[str, Any] = manager.load([name])
        is_group = name in found["groups"]
        loaded[name] = [found["groups"][name]] if is_group else [*found["tasks"].values()]
        for leaf, task in found["tasks"].items():
            if "ifeval" in leaf:
                _check_sentences(leaf)
            if task.get_config("output_type") == "generate_until":
                settings = {**(task.get_config("generation_kwargs") or {}), **given}
                check_room(model, leaf, settings)
    return loaded


def check_room(model: HarnessModel, name: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings of a generation that the model cannot follow.

    Raises:
        ConfigError: one is not known, or no room is left for a prompt.
    """
    try:
        model.cut_prompt([], settings)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _check_sentences(name: str) -> None:
    """Refuse to begin where the harness will find no data to split sentences with.

    It has tried to download them as it loaded the task, and only logged that it could not.
    """
    import nltk  # takes a second, and only tasks of this kind have it

    try:
        nltk.data.find(_SENTENCES)
    except LookupError as error:
        raise ConfigError(
            f"{name} splits sentences with nltk's data 'punkt_tab', which are not there and could"
            " not be downloaded; fetch them where there is a network, with python -m"
            " nltk.downloader -d DIR punkt_tab, and name DIR in the environment variable NLTK_DATA"
        ) from error


@contextlib.contextmanager
def explained(tasks: Sequence[str]) -> Iterator[None]:
    """Tell which tasks the harness failed at within the context.

    Args:
        tasks: what it works on.
    """
    named = ", ".join(tasks)
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{named}: a task imports the package {error.name!r}, which is not there;"
            " the harness has extras for what its tasks need; install it, for IFEval with"
            " pip install 'lm-eval[ifeval]'"
        ) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the harness could not evaluate {named}: {type(error).__name__}: {error};"
            " look at the YAML and the data of the task"
        ) from error
