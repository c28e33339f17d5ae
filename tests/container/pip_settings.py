"""This machine's pip settings for a build: they are lent to its steps and never lie in a layer."""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = ":env:."
SECTIONS = re.compile(r"^(global|install|wheel)\.")
"""Settings of these sections are passed on, and those of the environment."""


@dataclass(frozen=True)
class PipSettings:
    """Settings as a file's text, and the local files and directories that they name."""

    text: str
    paths: list[str]

    @classmethod
    def of_this_machine(cls) -> "PipSettings":
        """What pip says of itself; here, and so for the steps of a build."""
        command = [sys.executable, "-m", "pip", "config", "list"]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        settings = read_settings(listing)
        return cls(render(settings), local_paths(settings))


def read_settings(listing: str) -> dict[str, str]:
    """Name and value of each line of `pip config list`; the environment's win, as in pip."""
    settings, environment = {}, {}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        if name.startswith(ENVIRONMENT) and not name.endswith(".config-file"):
            environment[f"global.{name.removeprefix(ENVIRONMENT)}"] = ast.literal_eval(value)
        elif SECTIONS.match(name):
            settings[name] = ast.literal_eval(value)
    settings.update(environment)
    return settings


def local_paths(settings: dict[str, str]) -> list[str]:
    """Absolute paths in the values that exist here, as they are or behind `file://`.

    An index of files comes with the directory around it, where the files are that it names.
    """
    found = set()
    for word in " ".join(settings.values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            found.add(str(path.parent if word.startswith("file://") else path))
    return sorted(found)


def render(settings: dict[str, str]) -> str:
    """The text of a pip.conf with `settings`; the words of a value stand on lines of their own."""
    sections: dict[str, list[str]] = {}
    for name, value in sorted(settings.items()):
        section, _, key = name.partition(".")
        words = "\n    ".join(value.split())
        sections.setdefault(section, []).append(f"{key} = {words}")
    return "".join(f"[{name}]\n" + "\n".join(lines) + "\n" for name, lines in sections.items())
