"""Makes a directory with a recipe, and SLURM commands that are scripts."""

from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """\
preset: olmoe_tiny
expert_model_parallel_size: 2
global_batch_size: 16
micro_batch_size: 2
seq_length: 64
train_iters: 50
mock_data: true
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory with a recipe the current one."""
    (tmp_path / "a.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fake(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put fake SLURM commands on a PATH without the real ones."""
    programs = here / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def add(name: str, script: str) -> None:
        path = programs / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    # Also hides the commands of an installed SLURM.
    for name in ("sbatch", "scontrol"):
        add(name, f"echo {name} must not be called >&2; exit 99")
    return add
