"""Functions decorated meanwhile are compiled with their options, at the first call and once."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron.trainer.runtime.postponed_compile import postponed_compile


def test_function_is_compiled_once_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []

    def record(function: Any, **options: Any) -> Any:
        compiled.append((function.__name__, options))
        return lambda *arguments: ("compiled", function(*arguments))

    monkeypatch.setattr(torch, "compile", record)
    with pytest.raises(KeyError), postponed_compile():

        @torch.compile
        def plain(x: int) -> int:
            return x + 1

        @torch.compile(dynamic=True)
        def named(x: int, y: int) -> int:
            return x * y

        raise KeyError
    assert torch.compile is record
    assert compiled == []
    assert [plain(1), plain(2), named(2, 3)] == [("compiled", 2), ("compiled", 3), ("compiled", 6)]
    assert compiled == [("plain", {}), ("named", {"dynamic": True})]
    assert plain.__name__ == "plain"


def test_commands_start_without_torchs_compiler() -> None:
    """One after another in a process of their own, where megatron-core is loaded all the same."""
    script = """
import contextlib, sys
from moe_app import cli

for command in (cli.pretrain, cli.generate):
    with contextlib.suppress(SystemExit):
        command(["--help"])
    compilers = {"torch._dynamo", "torch._inductor.compile_fx"} & sys.modules.keys()
    print("loaded", compilers, "megatron.core.fusions.fused_bias_swiglu" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("loaded")]
    assert found == ["loaded set() True"] * 2, done.stderr
