"""What the image's build asks of pip, worked out from pyproject.toml and from what the base has.

    python docker/requirements.py wanted EXTRAS      requirements of the project, without torch
    python docker/requirements.py pins               versions that pip must leave as they are
    python docker/requirements.py check FILE         fails if the versions in FILE are not those in
                                                     use, or torch is too old for the project

Requirements are installed in a layer of their own, before the code is copied, so that a change of
code leaves that layer as it was. Needs Python 3.11 and nothing else.
"""

import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import tomllib

PROJECT = Path("pyproject.toml")
PINNED = ("torch", "triton", "pytorch-triton", "numpy")
"""Packages that a base image compiles together: one of them replaced breaks the others."""


def wanted(project: Path, extras: Sequence[str]) -> list[str]:
    """Requirements to build and run `project` with `extras`; torch is installed by itself.

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
                " with commas between them"
            )
        found += optional[extra]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in found]
    if metadata["name"] in names:
        raise ValueError(f"an extra of {list(extras)} is made of others: name those in EXTRAS")
    return [line for name, line in zip(names, found, strict=True) if name != "torch"]


def pins() -> list[str]:
    """`NAME==VERSION` of each package in `PINNED` that this interpreter has."""
    found = []
    for name in PINNED:
        try:
            found.append(f"{name}=={distribution(name).version}")
        except PackageNotFoundError:
            continue
    return found


def changed(before: Sequence[str]) -> list[str]:
    """The lines of `before` that `pins` does not say any more."""
    now = pins()
    return [line for line in before if line not in now]


def too_old(project: Path) -> str | None:
    """What the project asks of torch, if the torch in use is older.

    A version like 2.13.0a0+nv, as base images have, comes before 2.13.0 and after 2.12.
    """
    from packaging.requirements import Requirement  # comes with the project's requirements

    metadata = tomllib.loads(project.read_text("utf-8"))["project"]
    for line in metadata["dependencies"]:
        wish = Requirement(line)
        if wish.name == "torch":
            if not wish.specifier.contains(distribution("torch").version, prereleases=True):
                return line
    return None


def main(argv: Sequence[str]) -> int:
    """Do what the module says; returns the exit status."""
    match list(argv):
        case ["wanted", extras]:
            try:
                lines = wanted(PROJECT, [name for name in extras.split(",") if name])
            except ValueError as error:
                sys.stderr.write(f"error: {error}\n")
                return 2
        case ["pins"]:
            lines = pins()
        case ["check", file]:
            if lost := changed(Path(file).read_text("utf-8").split()):
                sys.stderr.write(
                    f"error: pip replaced {', '.join(lost)} of the base image; in use now:"
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
