"""Ask pip whether every extra of pyproject.toml can be installed beside the installed torch."""

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from tests.paths import REPO

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
COMPILED = ("te",)
"""They say what they need in a setup.py that looks for CUDA, and compile as they install."""


_NO_ANSWER = ("Connection", "Max retries", "timed out", "HTTP error")
"""Tells, in pip's words, that an index does not answer."""


def pip(*words: str) -> subprocess.CompletedProcess[str]:
    """Ask pip; skip where the index leaves it without an answer."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-input", "--quiet"]
    try:
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--retries", "1", "--timeout", "20", *words],
            capture_output=True,
            text=True,
            cwd="/",
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("pip has no answer after five minutes")
    if done.returncode and any(sign in done.stderr for sign in _NO_ANSWER):
        pytest.skip(f"the index does not answer: {done.stderr.strip().splitlines()[-1]}")
    return done


@pytest.fixture(scope="module", autouse=True)
def index() -> None:
    """Skip where pip finds no packages, or is not there."""
    asked = pip("--no-deps", "--ignore-installed", "packaging")
    if asked.returncode:
        said = (asked.stderr.strip() or "it says nothing").splitlines()[-1]
        pytest.skip(f"pip reaches no index, extras are not resolved: {said}")


def requirements(extra: str) -> list[str]:
    """Return what an extra consists of, those it is made of included."""
    found = []
    for line in EXTRAS[extra]:
        own = re.fullmatch(rf"{PROJECT['name']}\[(.*)\]", line)
        parts = own[1].split(",") if own else []
        found += [each for part in parts for each in requirements(part)] if own else [line]
    return found


def resolve(wanted: list[str]) -> str:
    """Return why pip cannot install these beside torch and what is required; empty if it can."""
    with tempfile.TemporaryDirectory() as folder:
        # As constraints, which cost nothing where nothing asks for them.
        kept = Path(folder) / "constraints.txt"
        kept.write_text("\n".join([f"torch=={version('torch')}", *PROJECT["dependencies"]]))
        done = pip("--only-binary", ":all:", "--constraint", str(kept), *wanted)
    return done.stderr if done.returncode else ""


def is_installed(line: str) -> bool:
    """Return whether pip has installed what a requirement wants, if it wants anything here."""
    wanted = Requirement(line)
    if wanted.marker is not None and not wanted.marker.evaluate():
        return True
    try:
        return wanted.specifier.contains(version(wanted.name), prereleases=True)
    except PackageNotFoundError:
        return False


def test_every_extra_resolves_to_packages_that_are_built() -> None:
    """What is installed beside torch has been resolved; pip is asked for the rest."""
    names = [name for name in EXTRAS if name not in COMPILED]
    asked = [name for name in names if not all(map(is_installed, requirements(name)))]
    # All at once, because most of pip's time is what they share; two extras may exclude each other.
    if resolve([each for name in asked for each in requirements(name)]):
        refused = {name: why for name in asked if (why := resolve(requirements(name)))}
        assert not refused


def test_what_excludes_the_installed_torch_is_found() -> None:
    assert "conflicting dependencies" in resolve([f"torch<{version('torch').split('.')[0]}"])


@pytest.mark.parametrize("extra", COMPILED)
def test_a_compiled_extra_names_what_there_is(extra: str) -> None:
    """Where torch has CUDA, all that it needs is resolved too."""
    if torch.version.cuda is not None:
        done = pip("--no-build-isolation", f"torch=={version('torch')}", *requirements(extra))
        assert done.returncode == 0, done.stderr
    done = pip("--no-deps", "--ignore-installed", "--report", "-", *requirements(extra))
    assert done.returncode == 0, done.stderr
    packages: list[dict[str, Any]] = json.loads(done.stdout)["install"]
    assert len(packages) == len(requirements(extra))
    for package in packages:
        there = package["metadata"].get("provides_extra", [])
        assert set(package.get("requested_extras", [])) <= set(there)
