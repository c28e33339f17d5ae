"""Finds tasks of the harness by their names."""

from collections.abc import Sequence
from pathlib import Path

from lm_eval.tasks import TaskManager

from megatron.trainer.errors import ConfigError

OWN_TASKS = Path(__file__).parents[1] / "tasks"
"""Task files of the project."""


def find_tasks(include_path: Sequence[str], tasks: Sequence[str]) -> TaskManager:
    """Find the tasks by their names.

    Args:
        include_path: directories of the user's task files.
        tasks: names of tasks, groups or tags.

    Raises:
        ConfigError: one is not there, or a task's file cannot be read.
    """
    for path in include_path:
        if not Path(path).is_dir():
            raise ConfigError(
                f"--include-path {path} is no directory; it holds the YAML files of tasks; name"
                " another one"
            )
    given = [str(OWN_TASKS), *include_path]
    manager = TaskManager(include_path=given, include_defaults=False)
    if not all(name in manager.all_subtasks for name in tasks):
        # Thousands of files, which take seconds; a group may have some of them as parts.
        manager = TaskManager(include_path=given)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"no task is called {', '.join(map(repr, unknown))}; `lm-eval ls tasks` lists those"
            " of the harness, and --include-path adds a directory of others; name one of these"
        )
    return manager
