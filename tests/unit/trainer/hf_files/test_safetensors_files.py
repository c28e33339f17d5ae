"""Safetensors directories: compared with the safetensors library, and damaged in every way."""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.trainer.errors import CheckpointError, ConfigError
from megatron.trainer.hf_files import (
    HFDirectory,
    HFWriter,
    new_directory,
    parse_size,
    plan_shards,
)
from megatron.trainer.hf_files import directory as hf_directory
from megatron.trainer.hf_files.header import MAX_HEADER_BYTES

SHAPES = {"a": (5, 3), "b": (2, 3, 4), "c": (7,), "d": (4, 6)}


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def make(path: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file(tensors or weights(), path / "model.safetensors")
    return path


def write(directory: Path, tensors: dict[str, torch.Tensor], max_bytes: int) -> None:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtype = next(iter(tensors.values())).dtype
    with HFWriter(directory, plan_shards(shapes, dtype, max_bytes=max_bytes), dtype) as writer:
        for name, tensor in reversed(tensors.items()):  # any order
            for row in reversed(range(len(tensor))):
                writer.write(name, row, tensor[row : row + 1])
        writer.finish()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_that_are_read_equal_what_the_library_reads(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    expected = weights(dtype)
    with HFDirectory(make(tmp_path / "hf", expected)) as directory:
        assert {name: entry.shape for name, entry in directory.tensors.items()} == SHAPES
        for name, tensor in expected.items():
            assert torch.equal(directory.read(name, start=0, count=len(tensor)), tensor)
            middle = directory.read(name, start=1, count=1)
            assert middle.dtype is dtype
            assert torch.equal(middle, tensor[1:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("max_bytes", [10**9, 60])
def test_library_reads_what_is_written_in_any_order(
    dtype: torch.dtype, max_bytes: int, tmp_path: Path
) -> None:
    expected = weights(dtype)
    out = tmp_path / "out"
    write(out, expected, max_bytes)
    found: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if max_bytes < 10**9:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        for name, file_name in index["weight_map"].items():
            assert name in load_file(out / file_name)
        assert len(set(index["weight_map"].values())) == len(list(out.glob("*.safetensors"))) > 1
    with HFDirectory(out) as directory:
        assert torch.equal(directory.read("b", start=0, count=2), expected["b"])


def test_region_holds_the_bytes_of_the_tensor(tmp_path: Path) -> None:
    expected = weights()
    with HFDirectory(make(tmp_path / "hf", expected)) as directory:
        region = directory.region("b")
        raw = os.pread(region.descriptor, region.num_bytes, region.begin)
    assert raw == expected["b"].view(torch.uint8).numpy().tobytes()


def test_tensor_larger_than_a_shard_has_one_of_its_own() -> None:
    plans = plan_shards({"a": (2,), "b": (100,), "c": (2,)}, torch.float32, max_bytes=16)
    assert [list(plan.tensors) for plan in plans] == [["a"], ["b"], ["c"]]
    assert [plan.name for plan in plans][1] == "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2GiB", 2 << 30), ("77", 77), ("3MiB", 3 << 20)],
)
def test_size_of_a_file_is_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "5 TB", "GB", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    message = (
        f"{text!r} is no size of a file; give a number of bytes above 0, with KB, MB, GB (powers"
        " of 1000), KiB, MiB or GiB (of 1024); 5GB, for example"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_size(text)


def test_rows_left_out_or_written_twice_are_found(tmp_path: Path) -> None:
    plans = plan_shards({"a": (2, 2)}, torch.float32, max_bytes=100)
    for number, rows in enumerate(([0], [0, 1, 1])):
        directory = tmp_path / str(number)
        directory.mkdir()
        with HFWriter(directory, plans, torch.float32) as writer:
            for row in rows:
                writer.write("a", row, torch.ones(1, 2))
            with pytest.raises(ValueError, match="a for example; every row must be written"):
                writer.finish()


def test_rows_of_another_shape_or_type_are_refused(tmp_path: Path) -> None:
    plans = plan_shards({"a": (2, 2)}, torch.float32, max_bytes=100)
    with HFWriter(tmp_path, plans, torch.float32) as writer:
        with pytest.raises(ValueError, match="its other axes must agree"):
            writer.write("a", 0, torch.ones(1, 3))
        with pytest.raises(ValueError, match="its other axes must agree"):
            writer.write("a", 1, torch.ones(2, 2))
        with pytest.raises(ValueError, match=re.escape("the files hold torch.float32")):
            writer.write("a", 0, torch.ones(1, 2, dtype=torch.float16))


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "{file} has 0 bytes, too few for a safetensors file"),
    "absurd header": (
        with_header({}, length=1 << 62),
        f"{{file}} announces a header of {1 << 62} bytes; at most {MAX_HEADER_BYTES} are possible",
    ),
    "header beyond the end": (
        with_header({}, length=5000),
        "{file} announces a header of 5000 bytes, but has only 10 in all",
    ),
    "not JSON": (with_header(b"{nonsense"), "the header of {file} is not JSON"),
    "nested": (with_header(b"[" * 100_000), "the header of {file} is not JSON"),
    "twice": (with_header(b'{"a": 1, "a": 2}'), "a name comes twice"),
    "a list": (with_header([1]), "the header of {file} is not a JSON object of tensors"),
    "no shape": (with_header({"a": {"dtype": "F32"}}), "it must have dtype, shape and two"),
    "negative": (with_header({"a": entry(-4, 0, [1])}), "it must have dtype, shape and two"),
    "a bool": (with_header({"a": entry(0, 4, [True])}, b"1234"), "it must have dtype, shape"),
    "huge": (with_header({"a": entry(0, 4, [1 << 62, 1 << 62])}), "it must have dtype, shape"),
    "integers": (
        with_header({"a": entry(0, 4, [1], "I32")}, b"1234"),
        "tensor a in {file} is I32; weights must be BF16, F16, F32; convert it with transformers",
    ),
    "other size": (
        with_header({"a": entry(0, 8, [1])}, b"12345678"),
        "tensor a in {file} has 8 bytes, but F32 [1] are 4; the header is damaged",
    ),
    "overlap": (
        with_header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"1" * 12),
        "tensor a and tensor b in {file} overlap",
    ),
    "hole": (
        with_header({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"1" * 12),
        "tensor a and tensor b in {file} leave a hole",
    ),
    "cut short": (
        with_header({"a": entry(0, 8, [2])}, b"1234"),
        "{file} is cut short: it has",
    ),
    "metadata that safetensors refuses": (
        with_header({"__metadata__": {"format": 1}, "a": entry(0, 4, [1])}, b"1234"),
        "{file} cannot be read: Error while deserializing header",
    ),
    "too long": (
        with_header({"a": entry(0, 4, [1])}, b"12345"),
        "{file} is longer than its header says",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    path = make(tmp_path / "hf")
    file = path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(message.format(file=file))):
        HFDirectory(path)


def index(path: Path, weight_map: Any) -> None:
    (path / "model.safetensors").unlink()
    text = json.dumps({"weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(text)


def sharded(path: Path, first: dict[str, str]) -> None:
    index(path, first)
    save_file({name: weights()[name] for name in "ab"}, path / "one.safetensors")


def to_pipe(path: Path) -> None:
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")


def to_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "cannot open {path}/config.json"),
    "bad JSON": (
        lambda path: (path / "config.json").write_text("{"),
        "{path}/config.json is not JSON",
    ),
    "a list": (
        lambda path: (path / "config.json").write_text("[]"),
        "{path}/config.json holds a list, not a JSON object",
    ),
    "pickle": (
        to_pickle,
        "{path} holds its weights as pytorch_model.bin, a pickle, which can execute code; only"
        " safetensors are read",
    ),
    "nothing": (
        lambda path: (path / "model.safetensors").unlink(),
        "{path} holds no weights: neither model.safetensors nor model.safetensors.index.json; it"
        " holds config.json",
    ),
    "both": (
        lambda path: (path / "model.safetensors.index.json").write_text("{}"),
        "{path} holds both model.safetensors and model.safetensors.index.json",
    ),
    "empty index": (lambda path: index(path, {}), "lacks `weight_map`"),
    "absent file": (
        lambda path: index(path, {"a": "gone.safetensors"}),
        "names gone.safetensors, which the directory does not hold; download the rest",
    ),
    "parent": (
        lambda path: index(path, {"a": "../x.safetensors"}),
        "says that tensor a is in '../x.safetensors'; it must be the plain name",
    ),
    "absolute": (
        lambda path: index(path, {"a": "/etc/x.safetensors"}),
        "says that tensor a is in '/etc/x.safetensors'; it must be the plain name",
    ),
    "other suffix": (lambda path: index(path, {"a": "a.bin"}), "is in 'a.bin'; it must be"),
    "a number": (lambda path: index(path, {"a": 3}), "is in 3; it must be"),
    "tensor not in its file": (
        lambda path: sharded(path, dict.fromkeys("abc", "one.safetensors")),
        "one.safetensors lacks c, against what model.safetensors.index.json says",
    ),
    "tensor not in the index": (
        lambda path: sharded(path, {"a": "one.safetensors"}),
        "one.safetensors holds b besides, against what model.safetensors.index.json says",
    ),
    "a pipe": (to_pipe, "{path}/config.json is not a regular file"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_directory_is_refused(name: str, tmp_path: Path) -> None:
    spoil, message = SPOILT[name]
    path = make(tmp_path / "hf")
    spoil(path)
    with pytest.raises(CheckpointError, match=re.escape(message.format(path=path))):
        HFDirectory(path)


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}/x is not a directory; give")):
        HFDirectory(tmp_path / "x")


def test_hub_snapshot_of_links_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(make(tmp_path / "hf").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    with HFDirectory(snapshot) as directory:
        assert torch.equal(directory.read("a", start=0, count=5), weights()["a"])


def test_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = make(tmp_path / "hf")
    with HFDirectory(path) as directory:
        os.truncate(path / "model.safetensors", 300)
        with pytest.raises(CheckpointError, match=r"the file ends \d+ bytes too early"):
            for name, shape in SHAPES.items():
                directory.read(name, start=0, count=shape[0])


def test_a_file_renamed_after_its_check_is_not_read(tmp_path: Path) -> None:
    """What is mapped is the file whose header was checked, not whatever has its name by then."""
    expected = weights()
    path = make(tmp_path / "hf", expected)
    with HFDirectory(path) as directory:
        other = make(tmp_path / "other", {name: -tensor for name, tensor in expected.items()})
        (other / "model.safetensors").replace(path / "model.safetensors")
        assert torch.equal(directory.read("a", start=0, count=5), expected["a"])


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text("ascii")
    (found,) = re.findall(r"RssFile:\s+(\d+) kB", status)
    return 1024 * int(found)


@pytest.mark.parametrize("limit_mib", [4, 1024])
def test_pages_of_a_large_file_do_not_pile_up(
    limit_mib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_directory, "MAPPED_BYTES", limit_mib << 20)
    path = make(tmp_path / "hf", {"a": torch.ones(64, 1 << 18)})  # 64 rows of 1 MiB
    with HFDirectory(path) as directory:
        before = most = resident_file_bytes()
        for row in range(64):
            assert directory.read("a", start=row, count=1).sum() == 1 << 18
            most = max(most, resident_file_bytes())
        grown = (most - before) >> 20
        # The kernel maps some pages around the one that was touched.
        assert grown < 16 if limit_mib == 4 else grown > 56, grown


def test_new_directory_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_directory(out) as partial:
        (partial / "x").write_text("1")
        assert not out.exists()
    assert (out / "x").read_text() == "1"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, CheckpointError])
def test_nothing_is_left_of_a_block_that_ends_badly(
    error: type[BaseException], tmp_path: Path
) -> None:
    with pytest.raises(error), new_directory(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []


def test_existing_path_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "there").mkdir()
    for name in ("dangling", "there"):
        message = f"{tmp_path / name} exists; nothing is written over"
        with (
            pytest.raises(CheckpointError, match=re.escape(message)),
            new_directory(tmp_path / name),
        ):
            pass
    late = tmp_path / "late"
    with pytest.raises(CheckpointError, match="exists"), new_directory(late):
        late.mkdir()
    assert sorted(os.listdir(tmp_path)) == ["dangling", "late", "there"]


def test_leftover_is_removed_unless_its_process_lives(tmp_path: Path) -> None:
    dead = tmp_path / "out.tmp-00000000"
    dead.mkdir()
    other = tmp_path / "out.tmp-notours"
    other.mkdir()
    with new_directory(tmp_path / "out") as alive:
        assert not dead.exists()
        with pytest.raises(CheckpointError, match="exists"), new_directory(tmp_path / "out"):
            assert alive.exists()
            (tmp_path / "out").mkdir()
        (tmp_path / "out").rmdir()
    assert sorted(os.listdir(tmp_path)) == ["out", "out.tmp-notours"]
