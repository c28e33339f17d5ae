"""Check what the converter refuses, and that a failed conversion leaves no files."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from megatron.trainer.checkpoint import CheckpointStream
from megatron.trainer.hf_files import HFWriter
from moe_app.convert import convert_checkpoint
from tests.distributed.convert_models import make_hf

GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    return make_hf(tmp_path / "hf", "olmoe", "per-expert")


def run_import(tmp_path: Path, *flags: str) -> int:
    arguments = ["import", "--hf", str(tmp_path / "hf"), "--save", str(tmp_path / "run"), *flags]
    return convert_checkpoint.main(arguments)


def run_export(tmp_path: Path, *flags: str) -> int:
    arguments = ["export", "--load", str(tmp_path / "run"), "--hf", str(tmp_path / "out"), *flags]
    return convert_checkpoint.main(arguments)


def assert_refused(
    status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check for one message, status 2, and no files on the disk."""
    said = capsys.readouterr().err
    assert status == 2, said
    assert re.search(message, said), said
    assert said.count("Error: ") == 1
    assert os.listdir(tmp_path) == ["hf"]


Corrupt = Callable[[dict[str, torch.Tensor]], object]


class Case(NamedTuple):
    corrupt: Corrupt
    message: str


def widen(weights: dict[str, torch.Tensor]) -> None:
    weights[GATE] = torch.zeros(21, 48, dtype=torch.bfloat16)


def corrupt_value(value: float) -> Corrupt:
    def corrupt(weights: dict[str, torch.Tensor]) -> None:
        weights[GATE][3, :2] = value

    return corrupt


WRONG_WEIGHTS: dict[str, Case] = {
    "missing": Case(
        lambda weights: weights.pop(GATE),
        f"does not hold the weights that its config.json describes: 1 tensors are missing: {GATE};",
    ),
    "extra": Case(
        lambda weights: weights.update(surprise=torch.zeros(1, dtype=torch.bfloat16)),
        "1 tensors are unexpected: surprise;",
    ),
    "shape": Case(
        widen,
        f"1 tensors have another shape: {GATE} (config.json (20, 48), file (21, 48));",
    ),
    "mixed": Case(
        lambda weights: weights.update({GATE: weights[GATE].float()}),
        "weights must be of one type; convert them to one with --dtype",
    ),
    "nan": Case(
        corrupt_value(float("nan")),
        f"{GATE} holds 2 values that are not finite (NaN or infinite, or too large for"
        " torch.bfloat16); weights must be finite;",
    ),
    "infinite": Case(corrupt_value(float("-inf")), f"{GATE} holds 2 values that are not finite"),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_mismatched_weights_are_refused(
    name: str,
    source: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, weights = source
    WRONG_WEIGHTS[name].corrupt(weights)
    save_file(weights, path / "model.safetensors")
    message = re.escape(WRONG_WEIGHTS[name].message)
    assert_refused(run_import(tmp_path), message, tmp_path, capsys)


def test_mixed_types_are_accepted_with_dtype(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, weights = source
    WRONG_WEIGHTS["mixed"].corrupt(weights)
    save_file(weights, path / "model.safetensors")
    assert run_import(tmp_path, "--dtype", "bf16") == 0


def test_fp16_needs_a_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "hf", "olmoe", "per-expert", dtype=torch.float16)
    message = re.escape(
        "are torch.float16; a run trains in bf16 or fp32; give --dtype fp32 (exact) or --dtype bf16"
    )
    assert_refused(run_import(tmp_path), message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mixtral"},
            "model_type is 'mixtral'; it must be one of jetmoe, olmo, olmoe",
        ),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings is '64'; it must be a number"),
        ({"hidden_size": 50}, "hidden_size"),
    ],
)
@pytest.mark.usefixtures("source")
def test_unsupported_config_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert_refused(run_import(tmp_path), message, tmp_path, capsys)


@pytest.mark.usefixtures("source")
def test_symlink_out_of_the_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    secret = tmp_path_factory.mktemp("home") / "secret"
    secret.write_text("{}")
    link = tmp_path / "hf" / "chat_template.jinja"
    link.symlink_to(secret)
    message = re.escape(f"{link} is a link to {secret}, outside of the checkpoint")
    assert_refused(run_import(tmp_path), message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("model.safetensors", "gone", "cannot open {}: No such file or directory; the directory"),
        ("tokenizer.json", "gone", "cannot open {}: No such file or directory; the directory"),
        ("config.json", ".", "{} is not a regular file; put the file itself there"),
    ],
)
@pytest.mark.usefixtures("source")
def test_dangling_symlink_is_not_skipped(
    name: str, target: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "hf" / name
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    assert_refused(run_import(tmp_path), re.escape(message.format(link)), tmp_path, capsys)


@pytest.mark.usefixtures("source")
def test_several_processes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "torchrun started 2 processes; a conversion runs in one"
    assert_refused(run_import(tmp_path), message, tmp_path, capsys)


@pytest.mark.usefixtures("source")
def test_too_small_disk_is_refused_before_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1000))
    monkeypatch.setattr(CheckpointStream, "__init__", None)
    message = (
        rf"{tmp_path}/run needs [\d,]+ bytes, but its disk has 1,000 free; free some space, or"
    )
    assert_refused(run_import(tmp_path), message, tmp_path, capsys)


def raise_disk_full(*_: object, **_named: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL = r"the disk of \S+ is full: [\d,]+ bytes are needed in all, [\d,]+ are free after the unfin"


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("moment", ["write", "_write_metadata", "finish"])
def test_full_disk_on_import_leaves_no_files(
    moment: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CheckpointStream, moment, raise_disk_full)
    assert_refused(run_import(tmp_path), FULL, tmp_path, capsys)


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("moment", ["write", "finish"])
def test_full_disk_on_export_leaves_no_files(
    moment: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_import(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(HFWriter, moment, raise_disk_full)
    assert run_export(tmp_path) == 2
    assert re.search(FULL, capsys.readouterr().err)
    assert sorted(os.listdir(tmp_path)) == ["hf", "run"]


@pytest.mark.usefixtures("source")
def test_full_disk_at_the_report_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_checkpoint, "write_text", raise_disk_full)
    assert run_import(tmp_path) == 2
    message = f"{tmp_path}/run is complete, but its report conversion_report.json cannot be written"
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("source")
def test_existing_output_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_import(tmp_path) == 0
    shard = tmp_path / "run" / "iter_0000000" / "__0_0.distcp"
    before = shard.read_bytes()
    capsys.readouterr()
    assert run_import(tmp_path) == 2
    assert f"{tmp_path}/run exists and holds conversion_report.json, iter_0000000, latest" in (
        capsys.readouterr().err
    )
    assert shard.read_bytes() == before
    (tmp_path / "out").mkdir()
    assert run_export(tmp_path) == 2
    assert f"{tmp_path}/out exists; nothing is written over" in capsys.readouterr().err


@pytest.mark.usefixtures("source")
def test_leftover_of_a_killed_import_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "run" / "iter_0000000.tmp-0badcafe"
    leftover.mkdir(parents=True)
    assert run_import(tmp_path) == 0
    assert not leftover.exists()


@pytest.mark.usefixtures("source")
def test_corrupt_checkpoint_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_import(tmp_path)
    shard = tmp_path / "run" / "iter_0000000" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert run_export(tmp_path) == 2
    assert "is damaged: __0_0.distcp has changed" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["hf", "run"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--iteration", "7"], "has no checkpoint of iteration 7; it has 0"),
        (["--max-shard-size", "many"], "'many' is no size of a file"),
        (["--max-shard-size", "9" * 400], "is no size of a file"),
        (["--like", "{tmp_path}"], "cannot open {tmp_path}/config.json"),
        (["--like", "{tmp_path}/no"], "{tmp_path}/no is not a directory; give one that holds"),
    ],
)
@pytest.mark.usefixtures("source")
def test_invalid_export_flag_is_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_import(tmp_path)
    capsys.readouterr()
    assert run_export(tmp_path, *(flag.format(tmp_path=tmp_path) for flag in flags)) == 2
    assert message.format(tmp_path=tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_layout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "hf", "jetmoe", "fused")
    run_import(tmp_path)
    capsys.readouterr()
    assert run_export(tmp_path, "--layout", "per-expert") == 2
    assert "jetmoe checkpoints have no layout 'per-expert'; use fused" in capsys.readouterr().err


def test_permission_error_is_reported(
    source: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "run"))

    monkeypatch.setattr(Path, "mkdir", denied)
    message = re.escape(f"cannot write {tmp_path}/run: Permission denied; give a directory that")
    assert_refused(run_import(tmp_path), message, tmp_path, capsys)


@pytest.mark.usefixtures("source")
def test_verification_sets_the_exit_status_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_app.convert import hf_verify

    seen = []

    def verify(found: Any, hf: Path, *, same_weights: bool) -> dict[str, Any]:
        seen.append((found.path, hf))
        assert same_weights
        return {"passed": len(seen) == 1}

    monkeypatch.setattr(hf_verify, "verify", verify)
    assert run_import(tmp_path, "--verify") == 0
    assert run_export(tmp_path, "--verify") == 1
    native = tmp_path / "run" / "iter_0000000"
    assert seen == [(native, tmp_path / "hf"), (native, tmp_path / "out")]
    for directory, passed in (("run", True), ("out", False)):
        report = json.loads((tmp_path / directory / "conversion_report.json").read_text())
        assert report["verification"] == {"passed": passed}
        assert report["num_tensors"] > 50


def test_command_runs_without_transformers(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Check that only --verify needs it, and fails before the conversion starts."""
    run = tmp_path / "run"
    program = f"""
import os, sys
sys.modules["transformers"] = None
from moe_app.convert import convert_checkpoint
command = ["import", "--hf", {str(source[0])!r}, "--save", {str(run)!r}]
print(convert_checkpoint.main([*command, "--verify"]), os.path.exists({str(run)!r}))
print("then", file=sys.stderr, flush=True)
print(convert_checkpoint.main(command))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.stdout.splitlines() == ["2 False", "0"], done.stderr
    refused, _, imported = done.stderr.partition("then")
    assert "pip install 'megatron-moe[hf]'" in refused
    assert re.search(r"imported: 57 tensors, 0.00 GB in \d+ s; report in ", imported)
