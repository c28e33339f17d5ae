"""Tests the text of the batch scripts, and the parts of them that need no SLURM."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.paths import REPO

EXAMPLES = REPO / "examples" / "slurm"
SCRIPTS = sorted(EXAMPLES.glob("*.sbatch"))


def late_directives(text: str) -> list[str]:
    """List the #SBATCH lines that sbatch ignores because a command precedes them."""
    lines = text.splitlines()
    is_command = [bool(line.strip()) and not line.lstrip().startswith("#") for line in lines]
    first = is_command.index(True) if True in is_command else len(lines)
    return [line for line in lines[first:] if line.startswith("#SBATCH")]


def unsafe_directives(text: str) -> list[str]:
    """List log directives with a directory, which if missing makes the job fail silently."""
    return re.findall(r"^#SBATCH.*--(?:output|error)=\S*/.*", text, flags=re.MULTILINE)


def test_there_are_four_scripts() -> None:
    assert [path.stem for path in SCRIPTS] == [
        "anneal_chain",
        "array_ablation",
        "convert_and_evaluate",
        "pretrain",
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_has_its_directives_first_and_its_log_in_an_existing_directory(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert late_directives(text) == []
    assert unsafe_directives(text) == []
    assert len(re.findall(r"^#SBATCH --", text, flags=re.MULTILINE)) >= 5
    # Its own path is that of a copy in SLURM's spool directory.
    assert "BASH_SOURCE" not in text and "$0" not in text
    assert "\nset -euo pipefail\n" in text


def test_late_or_unsafe_directive_is_found() -> None:
    text = "#!/bin/bash\n#SBATCH --nodes=1\n\n# so\nset -e\n#SBATCH --time=1\n"
    assert late_directives(text) == ["#SBATCH --time=1"]
    assert unsafe_directives("#SBATCH -J a --output=logs/%j.out\n") != []


def container_options(tmp_path: Path, *directories: str, **variables: str) -> list[str]:
    """Return interpreter and container options of a step."""
    script = 'source "$REPO/examples/slurm/common.sh"; choose_python "$@"; echo "$PYTHON"'
    script += '; [[ ${#container[@]} == 0 ]] || printf "%s\\n" "${container[@]}"'
    done = subprocess.run(
        ["bash", "-euc", script, "bash", *directories],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "REPO": str(REPO), **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return done.stdout.splitlines()


def test_container_mounts_the_directories_of_the_job(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    options = container_options(
        tmp_path,
        str(tmp_path / "runs"),
        "/scratch/run",
        CONTAINER_IMAGE="/images/moe.sqsh",
        CONTAINER_MOUNTS="/data:/data:ro,/etc/a:/b",
    )
    # One option for all mounts, because pyxis uses only the last one.
    mounts = f"{tmp_path}:{tmp_path},{REPO}:{REPO},/scratch/run:/scratch/run"
    assert options == [
        "python3",
        "--container-image=/images/moe.sqsh",
        f"--container-mounts={mounts},/data:/data:ro,/etc/a:/b",
        f"--container-workdir={tmp_path}",
    ]


def test_no_image_gives_no_container_options(tmp_path: Path) -> None:
    assert container_options(tmp_path, "/scratch/run", PYTHON="/opt/python") == ["/opt/python"]


def test_a_task_of_an_array_trains_one_run_of_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "studies.yaml").touch()
    done = subprocess.run(
        [
            *("bash", str(EXAMPLES / "array_ablation.sbatch")),
            *("out", "--studies", "studies.yaml", "--seeds", "1,2"),
        ],
        cwd=tmp_path,
        env={
            "PATH": os.defpath,
            "REPO": str(REPO),
            "PYTHON": "echo",
            "SLURM_ARRAY_TASK_ID": "5",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [
        *(str(REPO / "tools/ablate.py"), "studies.yaml", "--output", "out"),
        *("--index", "5", "--seeds", "1,2"),
    ]
