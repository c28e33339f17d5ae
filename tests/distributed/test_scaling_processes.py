"""Runs the processes sweep of benchmarks/scaling at a toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling.processes import layout_flags, worlds
from benchmarks.shapes import SHAPES
from tests.distributed.launcher import REPO


def test_processes_agree_and_communicate_as_modelled(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.scaling", "--sweep", "processes"),
            *("--shape", "olmoe_toy", "--values", "2", "--rounds", "2", "--steps", "1"),
            *("--json", str(file), "--plot-dir", str(tmp_path)),
        ],
        cwd=REPO, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "scaling_processes.png").read_bytes().startswith(b"\x89PNG")
    layouts = json.loads(file.read_text("utf-8"))["layouts"]
    assert list(layouts) == ["1", "DP2", "EP2", "TP2", "PP2"]
    assert (layouts["1"]["calls"], layouts["1"]["modelled_calls"]) == (0, 0)
    for name, row in layouts.items():
        assert row["calls"] == row["modelled_calls"], name
        assert row["bytes"] == row["modelled_bytes"], name
        assert len(row["seconds"]) == 2
        assert f"| {name if row['kind'] else 'one process'} |" in done.stdout
    assert layouts["EP2"]["calls"] > 20


def test_failing_rank_reports_its_error_and_continues() -> None:
    flags = layout_flags(SHAPES["olmoe_toy"], 1, "DP")
    with worlds([1]) as ranks:
        with pytest.raises(RuntimeError, match=r"a rank failed:[\s\S]*must be a multiple of"):
            ranks[1].call(layout_flags(SHAPES["olmoe_toy"], 3, "EP"), 1)
        (answer,) = ranks[1].call(flags, 1)
    assert answer["loss"] > 0
