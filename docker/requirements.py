"""Derives pip requirements of the image from pyproject.toml and the base image.

    python docker/requirements.py wanted EXTRAS      requirements of the project, without torch
    python docker/requirements.py core               the tested megatron-core, for each Python
    python docker/requirements.py pins               versions that pip must not change
    python docker/requirements.py check FILE         fails if the versions in FILE are not the
                                                     installed ones, or torch is too old

Requirements are installed in a separate layer before the code is copied, so that code changes do
not invalidate it. Needs only Python 3.11.
"""

import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import tomllib

PROJECT = Path("pyproject.toml")
PINNED = ("torch", "triton", "pytorch-triton", "numpy")
"""Packages that a base image builds against each other; replacing one breaks the others."""


def wanted(project: Path, extras: Sequence[str]) -> list[str]:
    """List the requirements to build and run `project` with `extras`, except torch.

    Raises:
        ValueError: `project` has no such extra.
    """
    settings = tomllib.loads(project.read_text("utf-8"))
    metadata = settings["project"]
    optional = metadata["optional-dependencies"]
    found = [*settings["build-system"]["requires"], *metadata["dependencies"]]
    for extra in extras:
        if extra not in optional:
            raise ValueError(
                f"{project} has no extra {extra!r}: EXTRAS takes names of {', '.join(optional)},"
                " separated by commas"
            )
        found += optional[extra]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in found]
    if metadata["name"] in names:
        raise ValueError(f"an extra of {list(extras)} consists of others: name those in EXTRAS")
    return [line for name, line in zip(names, found, strict=True) if name != "torch"]


def core(project: Path) -> list[str]:
    """List the megatron-core that is tested with each Python: the lowest that `project` allows."""
    found = tomllib.loads(project.read_text("utf-8"))["project"]["dependencies"]
    return [
        re.sub(r">=([\w.]+),<[\w.]+", r"==\1", line)
        for line in found
        if line.startswith("megatron-core>=")
    ]


def pins() -> list[str]:
    """List `NAME==VERSION` of each installed package in `PINNED`."""
    found = []
    for name in PINNED:
        try:
            found.append(f"{name}=={distribution(name).version}")
        except PackageNotFoundError:
            continue
    return found


def changed(before: Sequence[str]) -> list[str]:
    """List the lines of `before` that `pins` no longer returns."""
    now = pins()
    return [line for line in before if line not in now]


def too_old(project: Path) -> str | None:
    """Return the project's requirement of torch if the installed torch is older.

    A base image's pre-release such as 2.13.0a0+nv is between 2.12 and 2.13.0.
    """
    from packaging.requirements import Requirement  # installed with the project's requirements

    metadata = tomllib.loads(project.read_text("utf-8"))["project"]
    for line in metadata["dependencies"]:
        requirement = Requirement(line)
        if requirement.name == "torch":
            if not requirement.specifier.contains(distribution("torch").version, prereleases=True):
                return line
    return None


def main(argv: Sequence[str]) -> int:
    """Run the subcommand in `argv`; return the exit status."""
    match list(argv):
        case ["wanted", extras]:
            try:
                lines = wanted(PROJECT, [name for name in extras.split(",") if name])
            except ValueError as error:
                sys.stderr.write(f"error: {error}\n")
                return 2
        case ["core"]:
            lines = core(PROJECT)
        case ["pins"]:
            lines = pins()
        case ["check", file]:
            if lost := changed(Path(file).read_text("utf-8").split()):
                sys.stderr.write(
                    f"error: pip replaced {', '.join(lost)} of the base image; now installed:"
                    f" {', '.join(pins())}\n"
                )
                return 1
            if line := too_old(PROJECT):
                sys.stderr.write(
                    f"error: the base image has torch {distribution('torch').version}, the project"
                    f" needs {line}: name a newer BASE_IMAGE\n"
                )
                return 1
            lines = []
        case _:
            sys.stderr.write(f"{__doc__}\n")
            return 2
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
