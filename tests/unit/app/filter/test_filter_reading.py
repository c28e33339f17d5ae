"""Check what is read: kinds of files, hostile ones, what is found in folders."""

import gzip
import json
import os
import re
import resource
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron.trainer.data import text_input
from megatron.trainer.errors import DataError
from moe_app.data.sources import SourceFile, find_sources
from moe_app.filter import binary_lines, records
from moe_app.filter.records import BadEntry, Entry, json_line, read_entries

VALUES = [{"text": f"text {number} é\u0000", "n": number} for number in range(150)]
LINES = b"".join(json.dumps(value).encode() + b"\n" for value in VALUES)


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


def read(path: Path, key: str = "text") -> list[Entry | BadEntry]:
    return [
        entry
        for source in find_sources([str(path)])
        for entry in read_entries(source, text_key=key)
    ]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def save_dataset(folder: Path) -> Path:
    """Write what Dataset.save_to_disk writes."""
    table = pyarrow.Table.from_pylist(VALUES)
    folder.mkdir(parents=True)
    for number, part in enumerate((table.slice(0, 100), table.slice(100))):
        with pyarrow.OSFile(str(folder / f"data-{number}.arrow"), "wb") as file:
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(part)
    names = [{"filename": f"data-{number}.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "frames", "parquet", "dataset", "splits"])
def test_every_kind_of_file_holds_the_same_documents(kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(VALUES), path)
    elif kind == "dataset":
        path = save_dataset(tmp_path / "saved")
    elif kind == "splits":
        path = save_dataset(tmp_path / "saved" / "train").parent
        (path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    else:
        cut = len(LINES) // 2
        packed = {
            "jsonl": LINES,
            "gz": gzip.compress(LINES),
            "zst": zstd(LINES),
            "frames": zstd(LINES[:cut]) + zstd(LINES[cut:]),
        }
        path = write(tmp_path / f"a.jsonl.{kind}", packed[kind])
    entries = read(path)
    assert [entry.value for entry in entries if isinstance(entry, Entry)] == VALUES
    assert [entry.text for entry in entries if isinstance(entry, Entry)] == [
        value["text"] for value in VALUES
    ]


def test_each_bad_line_is_located_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binary_lines, "MOST_LINE_BYTES", 100)
    monkeypatch.setattr(binary_lines, "_BLOCK_BYTES", 16)
    bad = [
        (b'{"text": "a\xff"}', "not JSON"),
        (b'{"text": "a\0b"}', "not JSON"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": 1}', "'text' is a int"),
        (b'{"other": "a"}', "no key 'text'"),
        (b'["text"]', "a JSON list"),
        (b"[" * 90, "not JSON"),
        (b'{"text": "' + b"x" * 300 + b'"}', "more than"),
    ]
    content = b'{"text": "first"}\n\n'
    content += b"".join(line + b'\n{"text": "good"}\n' for line, _ in bad)
    entries = read(write(tmp_path / "a.jsonl", content + b'{"text": "last"}'))
    problems = [entry for entry in entries if isinstance(entry, BadEntry)]
    assert [entry.line for entry in problems] == [3 + 2 * number for number in range(len(bad))]
    for entry, (_, wanted) in zip(problems, bad, strict=True):
        assert f"a.jsonl, line {entry.line}: " in entry.problem and wanted in entry.problem
    texts = [entry.text for entry in entries if isinstance(entry, Entry)]
    assert texts == ["first", *["good"] * len(bad), "last"]


def test_line_of_a_gigabyte_is_passed_over_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binary_lines, "MOST_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(LINES[: LINES.index(b"\n") + 1] + b'{"text": "')
        file.seek(1 << 30, os.SEEK_CUR)  # a hole, which takes no disk space
        file.write(b'"}\n' + LINES)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    entries = read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # in KiB
    assert len(entries) == 2 + len(VALUES)
    assert isinstance(entries[1], BadEntry) and "more than 1,048,576" in entries[1].problem


def test_dataset_library_and_this_reader_agree(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_list(VALUES)
    made.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=made, test=made.select([3])).save_to_disk(tmp_path / "two")
    entries = read(tmp_path / "one") + read(tmp_path / "two")
    found = [entry.value for entry in entries if isinstance(entry, Entry)]
    assert found == [*VALUES, *VALUES, VALUES[3]]


def test_bad_utf8_in_a_table_costs_one_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"one", b"t\xffo", b"three"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    first, second, third = read(tmp_path / "a.parquet")
    assert isinstance(first, Entry) and isinstance(third, Entry) and third.text == "three"
    assert isinstance(second, BadEntry) and "row 2: not UTF-8" in second.problem


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_damaged_file_is_an_error_that_says_where(pack: object, tmp_path: Path) -> None:
    assert callable(pack)
    path = write(tmp_path / "a.jsonl.x", pack(os.urandom(99).hex().encode() * 999)[:-20])
    with pytest.raises(DataError, match=r"a.jsonl.x, after line \d+: cannot be unpacked"):
        list(read_entries(SourceFile(str(path), "jsonl", "a", 0, 0), text_key="text"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(DataError, match=r"b.parquet, after row 0: cannot be read as parquet"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize("line", [b"\0" * 999, b'{"text": ""}\n'])
def test_bomb_is_refused_after_a_bounded_part_of_it(
    line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_input, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(binary_lines, "MOST_LINE_BYTES", 1 << 10)
    path = write(tmp_path / "a.jsonl.zst", zstd(line * (20_000_000 // len(line))))
    with pytest.raises(DataError, match=r"unpacks to more than [12],\d{3},\d{3};"):
        read(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_many_rows_of_one_large_value_are_decoded_a_few_at_a_time(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = 1 << 18
    values = pyarrow.array(["a" * large]).dictionary_encode().dictionary
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64), values)
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        table = pyarrow.table({"text": rows.dictionary_decode()})
        parquet.write_table(table, path, compression="zstd")
        assert path.stat().st_size < 10_000
    else:
        batch = pyarrow.record_batch({"text": rows})
        with pyarrow.OSFile(str(path), "wb") as file:
            with pyarrow.ipc.new_stream(file, batch.schema) as writer:
                writer.write_batch(batch)
    monkeypatch.setattr(records, "_BYTES_AT_ONCE", 2 * large)
    source = SourceFile(str(path), "parquet" if kind == "parquet" else "arrow", "a", 1 << 20, 0)
    most = 0
    before = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(before)
    pyarrow.set_memory_pool(pool)
    tracemalloc.start()
    try:
        for number, _, value in records.read_rows(source):
            assert isinstance(value, dict) and len(value["text"]) == large
            most = max(most, number)
        python_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pyarrow.set_memory_pool(before)
    assert most == 64
    # Some copies of the two rows that are decoded together; all 64 would be 16 MiB.
    assert pool.max_memory() < 12 * large and python_peak < 8 * large


def test_a_row_that_is_too_large_is_a_bad_one(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "t" * 5000, "three"]}), path)
    (source,) = find_sources([str(path)])
    found = [value for _, _, value in records.read_rows(source, most_line_bytes=1000)]
    assert found[::2] == [{"text": "one"}, {"text": "three"}]
    assert str(found[1]).startswith(f"{path}, row 2: has more than 1,000 bytes")


def test_parquet_that_says_it_unpacks_to_a_bomb_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_input, "FREE_BYTES", 1 << 20)
    table = pyarrow.table({"text": ["a" * 100_000] * 64})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=r"a.parquet unpacks to more than 6,4\d\d,\d{3}; "):
        read(path)


def test_folders_and_patterns_are_searched_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl.gz", "a/c.parquet", "a/note.txt"):
        write(tmp_path / name, b"")
    found = find_sources([str(tmp_path)])
    assert [each.name for each in found] == ["c", "z", "b"]
    found = find_sources([f"{tmp_path}/**/*.jsonl*"])
    assert [each.name for each in found] == ["z", "b"]
    write(tmp_path / "d/b.jsonl", b"")
    found = find_sources([f"{tmp_path}/b.jsonl", f"{tmp_path}/d"])
    assert [each.name for each in found] == ["00000-b", "00001-b"]


def test_link_out_of_a_folder_is_refused_unless_it_is_named_itself(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret.jsonl", b'{"text": "secret"}\n')
    folder = tmp_path / "data"
    write(folder / "a.jsonl", b"")
    (folder / "b.jsonl").symlink_to(secret)
    (folder / "inside.jsonl").symlink_to("a.jsonl")
    for text in (str(folder), f"{folder}/*.jsonl"):
        with pytest.raises(DataError, match=re.escape(f"b.jsonl is a link to {secret}, out of")):
            find_sources([text])
    assert find_sources([f"{folder}/b.jsonl"])[0].name == "b"
    (folder / "snapshots").mkdir()
    with pytest.raises(DataError, match="is a link to"):
        find_sources([str(folder)])
    (folder / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"--input names .*inside.jsonl twice, also as .*a.jsonl"):
        find_sources([f"{folder}/a.jsonl", f"{folder}/inside.jsonl"])


def test_links_of_a_hub_cache_lead_to_its_blobs_and_nowhere_else(tmp_path: Path) -> None:
    cache = tmp_path / "hub/datasets--a--b"
    write(cache / "blobs/0123", LINES)
    outside = write(tmp_path / "hub/datasets--c--d/blobs/45", LINES)
    snapshot = cache / "snapshots/main"
    (snapshot / "data/en").mkdir(parents=True)
    (snapshot / "data/en/a.jsonl").symlink_to("../../../../blobs/0123")
    for text in (str(snapshot), f"{snapshot}/data", f"{snapshot}/data/*/*.jsonl"):
        assert [each.name for each in find_sources([text])] == ["a"]
    (snapshot / "data/en/b.jsonl").symlink_to(outside)
    with pytest.raises(DataError, match=r"b.jsonl is a link to .*/45, out of"):
        find_sources([str(snapshot)])


def test_datasets_on_disk_are_found_in_a_folder(tmp_path: Path) -> None:
    (save_dataset(tmp_path / "all/saved") / "dataset_info.json").write_text("{\n}")
    write(tmp_path / "all/a.jsonl", LINES)
    write(tmp_path / "all/z.jsonl", LINES)
    found = find_sources([str(tmp_path / "all")])
    assert [each.name for each in found] == ["a", "data-0", "data-1", "z"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ('{"_data_files": [{"filename": "../secret.arrow"}]}', "does not describe a dataset"),
        ('{"_data_files": [], "_indices_data_files": [1]}', "after flatten_indices"),
        ("[" * 9999, "does not describe a dataset"),
    ],
)
def test_dataset_that_leads_elsewhere_is_refused(state: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=message):
        find_sources([str(tmp_path)])


@pytest.mark.parametrize("text", ["s3://a/b.jsonl", "zip://a::/b", "https://a/b.jsonl"])
def test_addresses_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"--input {text} is no local path")):
        find_sources([text])


def test_pipe_and_missing_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", tmp_path / "gone.jsonl"):
        with pytest.raises(DataError, match="does not exist or is no regular file"):
            find_sources([str(path)])


def test_lone_surrogate_in_metadata_survives_in_a_line() -> None:
    value = {"text": "a", "title": "\ud800é"}
    assert json.loads(json_line(value)) == value
