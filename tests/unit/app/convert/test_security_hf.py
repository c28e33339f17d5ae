"""Check that nothing in untrusted Hugging Face directories runs, is followed, or fills memory."""

import json
import os
import re
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from megatron.trainer.checkpoint import find_checkpoint
from megatron.trainer.checkpoint.manifest import write_manifest
from megatron.trainer.errors import CheckpointError, ConfigError
from megatron.trainer.hf_files import HFDirectory, directory
from moe_app.convert import convert_checkpoint, hf_verify
from moe_app.infer import generate
from tests.distributed.convert_models import make_hf

MIB = 1 << 20


def convert(*arguments: object) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make_hf(tmp_path / "hf", "olmoe", "per-expert")[0]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Hugging Face directory and the run imported from it."""
    root = tmp_path_factory.mktemp("shared")
    make_hf(root / "hf", "olmoe", "per-expert")
    assert convert("import", "--hf", root / "hf", "--save", root / "run") == 0
    return root


def change(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


@settings(
    max_examples=200,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_corrupt_header_is_refused_or_changes_a_name(data: st.DataObject, hf: Path) -> None:
    """Check that known names keep their bytes; a changed name makes one unexpected tensor."""
    path = hf / "model.safetensors"
    original = path.read_bytes()
    length = struct.unpack("<Q", original[:8])[0]
    with HFDirectory(hf) as source:
        known = {name: source.region(name).begin for name in source.tensors}
        entries = dict(source.tensors)
    corrupted = bytearray(original)
    corrupted[data.draw(st.integers(0, 7 + length))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(corrupted)
    try:
        with HFDirectory(hf) as source:
            for name in source.tensors.keys() & known.keys():
                assert source.region(name).begin == known[name]
                assert source.tensors[name] == entries[name]
            assert len(source.tensors.keys() - known.keys()) <= 1
    except CheckpointError:
        pass
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_experts": 10**12},
        {"vocab_size": 10**15},
        {"hidden_size": 6 * 10**9},
        {"intermediate_size": 10**12},
        {"num_hidden_layers": 10**300},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_config_of_an_absurd_size_allocates_no_memory(
    fields: dict[str, int], hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(hf, **fields)
    before = peak_bytes()
    assert convert("import", "--hf", hf, "--save", tmp_path / "run") == 2
    stderr = capsys.readouterr().err
    assert re.search(
        rf"{re.escape(str(hf))}/config\.json describes a model of [\d,]+ param", stderr
    )
    assert peak_bytes() - before < 64 * MIB
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["num_layers", "num_experts", "vocab_size"])
def test_checkpoint_of_an_absurd_size_allocates_no_memory(
    setting: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(shared / "run", run)
    path = run / "iter_0000000"
    text = (path / "config.yaml").read_text()
    changed = re.sub(rf"(?m)^{setting}: .*$", f"{setting}: {10**9}", text)
    assert changed != text
    (path / "config.yaml").write_text(changed)
    write_manifest(path, 0)
    before = peak_bytes()
    assert convert("export", "--load", run, "--hf", tmp_path / "out") == 2
    assert generate.main(["--load", str(run), "--prompt", "a", "--device", "cpu"]) == 2
    stderr = capsys.readouterr().err
    assert len(re.findall(r"config\.yaml describes a model of [\d,]+ parameters", stderr)) == 2, (
        stderr
    )
    assert peak_bytes() - before < 64 * MIB


TEMPLATE = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{% set x = cycler.__init__.__globals__.os %}"
)
TEMPLATE += "{{ x.mkdir('CANARY') }}"


def test_templates_are_copied_and_never_rendered(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    template = TEMPLATE.replace("CANARY", str(canary))
    jinja2.Environment().from_string(template).render()
    assert canary.exists()  # the template is live
    canary.rmdir()

    def boom(*_: Any, **__: Any) -> Any:
        raise AssertionError("a template is compiled")

    monkeypatch.setattr(jinja2.Environment, "compile", boom)
    monkeypatch.setattr(jinja2.Environment, "from_string", boom)
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    tokenizer.save(str(hf / "tokenizer.json"))
    settings = {
        "chat_template": template,
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"x": "y.z"},
    }
    files = {
        "tokenizer_config.json": json.dumps(settings),
        "chat_template.jinja": template,
        "generation_config.json": json.dumps({"custom_generate": "evil.py"}),
    }
    for name, text in files.items():
        (hf / name).write_text(text)
    run, out = tmp_path / "run", tmp_path / "out"
    assert convert("import", "--hf", hf, "--save", run) == 0
    assert (
        generate.main(
            ["--load", str(run), "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"]
        )
        == 0
    )
    assert convert("export", "--load", run, "--hf", out) == 0
    assert {name: (out / name).read_text() for name in files} == files
    assert not canary.exists()


def test_verification_runs_no_code_of_the_directory(hf: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name in ("modeling_evil.py", "configuration_evil.py", "__init__.py", "sitecustomize.py"):
        (hf / name).write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    change(
        hf,
        auto_map={
            "AutoConfig": "configuration_evil.Config",
            "AutoModelForCausalLM": "modeling_evil.Model",
        },
        attn_implementation="evil/kernels",
        experts_implementation="evil/kernels",
    )
    assert convert("import", "--hf", hf, "--save", tmp_path / "run", "--verify") == 0
    assert not canary.exists()
    assert not [name for name in sys.modules if "evil" in name]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_attn_implementation_internal": "evil/kernels"}, "_attn_implementation_internal"),
        ({"quantization_config": {"quant_method": "evil"}}, "quantization_config"),
        ({"model_type": "evil"}, "model_type is 'evil'"),
        ({"trust_remote_code": True}, "trust_remote_code"),
    ],
)
def test_fields_that_change_transformers_behaviour_are_refused(
    fields: dict[str, Any], message: str, shared: Path, tmp_path: Path
) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(shared / "hf", hf)
    change(hf, **fields)
    with pytest.raises(CheckpointError, match=message):
        hf_verify.verify(find_checkpoint(shared / "run"), hf, device="cpu")
    assert convert("import", "--hf", hf, "--save", tmp_path / "run") == 2


def test_adapter_config_is_refused(shared: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(shared / "hf", hf)
    (hf / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    with pytest.raises(CheckpointError, match=r"holds adapter_config\.json, which lets"):
        hf_verify.verify(find_checkpoint(shared / "run"), hf, device="cpu")


@pytest.mark.parametrize("version", ["4.56.0", "5.2.1"])
def test_vulnerable_transformers_version_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_verify.import_transformers(), "__version__", version)
    with pytest.raises(ConfigError, match=r"needs transformers 5\.3 or newer.*CVE-2026-4372"):
        hf_verify.import_transformers()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
)
@pytest.mark.parametrize("kind", ["huge", "pipe"])
def test_huge_or_special_files_are_refused(
    kind: str, name: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hf / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(hf / name)
    else:
        with (hf / name).open("wb") as file:
            file.truncate(1 << 40)  # sparse; takes no disk space
    before = peak_bytes()
    assert convert("import", "--hf", hf, "--save", tmp_path / "run") == 2
    stderr = capsys.readouterr().err
    assert ("is not a regular file" if kind == "pipe" else "more than 134,217,728 bytes") in stderr
    assert peak_bytes() - before < 4 * directory.MOST_BYTES
    assert not (tmp_path / "run").exists()


def hostile_index(**files: str) -> Callable[[Path], None]:
    def write(hf: Path) -> None:
        (hf / "model.safetensors").rename(hf.parent / "outside.safetensors")
        (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    return write


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "./../outside.safetensors",
        "/etc/outside.safetensors",
        "..",
        "sub/x.safetensors",
        "x.safetensors\0",
        "C:\\x.safetensors/../y.safetensors",
    ],
)
def test_index_cannot_name_files_outside_the_directory(
    name: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile_index(a=name)(hf)
    assert convert("import", "--hf", hf, "--save", tmp_path / "run") == 2
    assert "it must be the plain name of a .safetensors file" in capsys.readouterr().err


def test_tensor_names_are_not_used_as_file_names(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hf / "model.safetensors"
    original = path.read_bytes()
    length = struct.unpack("<Q", original[:8])[0]
    header = original[8 : 8 + length].rstrip()
    header = header.replace(b'"model.norm.weight"', b'"../../../\\u001b[2Jx"')
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + original[8 + length :])
    assert convert("import", "--hf", hf, "--save", tmp_path / "run") == 2
    stderr = capsys.readouterr().err
    assert "1 tensors are unexpected: ../../../\\x1b[2Jx" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
