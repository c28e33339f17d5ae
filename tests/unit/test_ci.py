"""Test which Python continuous integration takes for the newer line of megatron-core."""

import subprocess
from pathlib import Path

import pytest

from tests.paths import REPO


def fake_python(path: Path, prints: str) -> Path:
    """Make a program that prints a version as Python would, or fails if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{f'echo {prints}' if prints else 'exit 127'}\n")
    path.chmod(0o755)
    return path


def chosen(tmp_path: Path, **environment: str) -> str:
    found = subprocess.run(
        [REPO / ".ci/newer_python"],
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.strip()


@pytest.fixture
def no_system_python(tmp_path: Path) -> None:
    """Hide the machine's own from the search, behind programs that do not run."""
    for name in ("python3.12", "python3.13"):
        fake_python(tmp_path / "bin" / name, "")


@pytest.mark.usefixtures("no_system_python")
def test_none_is_taken_where_none_runs(tmp_path: Path) -> None:
    fake_python(tmp_path / ".pyenv/versions/3.11.7/bin/python", "3.11")
    fake_python(tmp_path / ".pyenv/versions/3.12.1/bin/python", "3.11")  # not what it is called
    assert chosen(tmp_path) == ""


@pytest.mark.usefixtures("no_system_python")
def test_shim_that_does_not_run_is_passed_over_for_pyenvs_own(tmp_path: Path) -> None:
    newest = fake_python(tmp_path / ".pyenv/versions/3.13.0/bin/python", "3.13")
    assert chosen(tmp_path) == str(newest)
    older = fake_python(tmp_path / "elsewhere/versions/3.12.1/bin/python", "3.12")
    assert chosen(tmp_path, PYENV_ROOT=str(tmp_path / "elsewhere")) == str(older)


def test_what_runs_in_path_comes_first(tmp_path: Path) -> None:
    fake_python(tmp_path / ".pyenv/versions/3.12.1/bin/python", "3.12")
    first = fake_python(tmp_path / "bin/python3.12", "3.12")
    assert chosen(tmp_path) == str(first)
