"""Tests that a run with a named expert backend can be scored where it is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launcher import REPO, flags


def run_tool(name: str, *arguments: str, interprets: bool) -> subprocess.CompletedProcess[str]:
    """Run a tool in its own process, where Triton works only in interpreter mode."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interprets:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-W", "ignore", str(REPO / "tools" / name), *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_triton_run_trains_and_is_scored_without_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    settings = flags(
        mock_data=True, save=tmp_path / "run", seq_length=8, micro_batch_size=1,
        global_batch_size=1, train_iters=2, num_layers=1, hidden_size=16, num_attention_heads=2,
        num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=8, vocab_size=64,
        expert_backend="triton", device="cpu",
    )  # fmt: skip
    refused = run_tool("pretrain.py", *settings, interprets=False)
    assert refused.returncode == 2
    assert "expert_backend 'triton' cannot be used: triton finds no GPU" in refused.stderr
    trained = run_tool("pretrain.py", *settings, interprets=True)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "expert backend: triton, named in the configuration" in trained.stderr
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"tokens": [1, 2, 3, 4]}) + "\n", encoding="utf-8")
    arguments = ["--load", tmp_path / "run", "--input", lines, "--output", tmp_path / "out.jsonl"]
    scored = run_tool("score.py", *map(str, arguments), "--device", "cpu", interprets=False)
    assert scored.returncode == 0, scored.stderr[-3000:]
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
