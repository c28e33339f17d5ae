"""QuACK takes the calls of cute_products.py: its references agree, and Hopper's code is made."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launcher import program
from tests.paths import REPO

NUM_CALLS = 17
REGISTERS = 64 * 1024
"""Of a multiprocessor of Hopper."""
THREADS = 3 * 128
"""Of QuACK's kernels: one group of warps loads, two multiply in turns."""
SPILLED = 256
"""Bytes of a thread: QuACK's tile of 128 x 192 has 192 sums of it, and four operands in backward's
epilogue. A tile of 128 x 128 spills none, but reads a fifth more."""


def test_quack_compiles_every_call_for_hopper_and_its_references_agree(tmp_path: Path) -> None:
    if importlib.util.find_spec("quack") is None:
        pytest.skip("quack is not installed; pip install 'megatron-moe[cute]'")
    environment = {
        **os.environ,
        **{"QUACK_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a", "QUACK_CACHE_ENABLED": "0"},
        **{"CUTE_DSL_KEEP_CUBIN": "1", "CUTE_DSL_DUMP_DIR": str(tmp_path)},
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("cute_compile_worker.py")
    done = subprocess.run(
        [sys.executable, *program(script), str(tmp_path)],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["errors"]) == NUM_CALLS
    # float64, but for gates, which the backend rounds to fp32 (2^-24).
    assert all(error <= 1e-6 for error in told["errors"].values()), told["errors"]
    gathered = {name for name in told["errors"] if "sorted" not in name}
    assert {each["call"] for each in told["kernels"]} == gathered, told["kernels"]
    for kernel in told["kernels"]:
        assert kernel["spilled"] <= (SPILLED if "gated gradient" in kernel["call"] else 0), kernel
        assert kernel["registers"] * THREADS <= REGISTERS, kernel
