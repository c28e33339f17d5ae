"""The kernels' machine code for Hopper, which needs no GPU to be made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launcher import program
from tests.paths import REPO

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")
REGISTERS = 64 * 1024
"""Of a multiprocessor of Hopper."""


def test_kernels_compile_for_hopper_and_spill_no_register(tmp_path: Path) -> None:
    if not Path(triton.knobs.nvidia.ptxas.path).exists():
        pytest.skip("this triton has no ptxas")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_worker.py")
    done = subprocess.run(
        [sys.executable, *program(script), str(tmp_path)],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    assert {each["kernel"] for each in kernels} >= {"statistics_kernel", "gated_unit_kernel"}
    for each in kernels:
        assert each["spilled"] == 0, each
        # Enough threads at one time to keep the memory busy: each has 32 bytes under way.
        assert each["threads"] * each["registers"] * max(1, 512 // each["threads"]) <= REGISTERS
