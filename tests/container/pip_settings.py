"""Reads this machine's pip settings, which builds mount so that no layer contains them."""

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
    """Holds the text of a pip.conf, and the local files and directories that it names."""

    text: str
    paths: list[str]

    @classmethod
    def of_this_machine(cls) -> "PipSettings":
        """Read the settings of this machine's pip."""
        command = [sys.executable, "-m", "pip", "config", "list"]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        settings = read_settings(listing)
        return cls(render(settings), local_paths(settings))


def read_settings(listing: str) -> dict[str, str]:
    """Parse `pip config list` to names and values; the environment overrides files, as in pip."""
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
    """List the existing absolute paths in the values, plain or after `file://`.

    An index of files comes with the directory around it, where the files are that it names.
    """
    found = set()
    for word in " ".join(settings.values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            found.add(str(path.parent if word.startswith("file://") else path))
    return sorted(found)


def render(settings: dict[str, str]) -> str:
    """Format `settings` as a pip.conf; each word of a value gets its own line."""
    sections: dict[str, list[str]] = {}
    for name, value in sorted(settings.items()):
        section, _, key = name.partition(".")
        words = "\n    ".join(value.split())
        sections.setdefault(section, []).append(f"{key} = {words}")
    return "".join(f"[{name}]\n" + "\n".join(lines) + "\n" for name, lines in sections.items())
