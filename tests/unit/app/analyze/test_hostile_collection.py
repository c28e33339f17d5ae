"""Collections that are damaged, foreign or malicious: one line that says what is wrong."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron.trainer.errors import CheckpointError, ConfigError, DataError
from moe_app.analyze.collect import position_of_name
from moe_app.analyze.collection import Collection, require_comparable
from moe_app.analyze.manifest import NAME, token_path, window_path
from moe_app.analyze.measures import measure_coactivation, measure_saturation
from moe_app.analyze.shard_file import check_pyarrow, describe_file
from moe_app.analyze.shard_writer import ShardWriter, routers_of
from moe_app.analyze.texts import (
    Domain,
    cut_windows,
    group_windows,
    parse_domains,
    token_blocks,
)
from moe_app.cli import analyze_routing
from tests.unit.app.analyze.routing_samples import routers, settings, write_collection


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "routing"
    write_collection(directory)
    return directory


def change(place: Path, edit: Any) -> None:
    """Edit the manifest."""
    values = json.loads((place / NAME).read_text())
    edit(values)
    (place / NAME).write_text(json.dumps(values))


def replace_shard(place: Path, table: pa.Table, *, compression: str = "none", **more: Any) -> None:
    """Put a table in place of the first shard, and let the manifest list it."""
    path = token_path(place, 0)
    pq.write_table(table, path, compression=compression, **more)
    described = describe_file(path)
    change(place, lambda values: values["shards"][0].update(token_file=described))


def first_shard(place: Path) -> pa.Table:
    return pq.read_table(token_path(place, 0))


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(name), values)


def measured(place: Path) -> None:
    measure_coactivation(Collection(place))


def test_a_foreign_shard_is_refused(place: Path, tmp_path: Path) -> None:
    write_collection(tmp_path / "other", seed=2)
    token_path(place, 1).write_bytes(token_path(tmp_path / "other", 1).read_bytes())
    with pytest.raises(DataError, match=r"tokens-000001.parquet is not the file that the manifest"):
        measured(place)


def test_a_decompression_bomb_is_refused(place: Path) -> None:
    table = first_shard(place)
    rows = 1 << 22
    bomb = pa.table(
        [
            pa.array(np.zeros(rows, dtype=field.type.to_pandas_dtype()))
            if not pa.types.is_fixed_size_list(field.type)
            else pa.FixedSizeListArray.from_arrays(
                pa.array(
                    np.zeros(
                        rows * field.type.list_size, dtype=field.type.value_type.to_pandas_dtype()
                    )
                ),
                type=field.type,
            )
            for field in table.schema
        ],
        schema=table.schema,
    )
    replace_shard(place, bomb, compression="zstd")
    assert token_path(place, 0).stat().st_size < 1 << 20  # of more than 300 MB
    change(place, lambda values: values["shards"][0].update(tokens=rows))
    with pytest.raises(DataError, match="is compressed with ZSTD"):
        measured(place)


def test_more_rows_than_the_manifest_says_are_refused(place: Path) -> None:
    table = first_shard(place)
    replace_shard(place, pa.concat_tables([table, table]))
    with pytest.raises(DataError, match=r"has 82 rows, but the manifest says 41"):
        measured(place)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda table: table.drop_columns(["moe.1.experts"]), r"another schema .*moe.1.experts"),
        (
            lambda table: table.rename_columns(
                ["x" if name == "domain" else name for name in table.column_names]
            ),
            r"another schema .*domain",
        ),
        (
            lambda table: table.cast(
                pa.schema(
                    [
                        field if field.name != "input" else pa.field("input", pa.string())
                        for field in table.schema
                    ]
                )
            ),
            "another schema",
        ),
    ],
)
def test_another_schema_is_refused(place: Path, edit: Any, message: str) -> None:
    replace_shard(place, edit(first_shard(place)))
    with pytest.raises(DataError, match=message):
        measured(place)


@pytest.mark.parametrize("value", [6, -1])
def test_experts_out_of_range_are_refused(place: Path, value: int) -> None:
    table = first_shard(place)
    kind = table.schema.field("moe.1.experts").type
    experts = np.tile(np.array([0, value], dtype=np.int16), len(table))
    wrong = pa.FixedSizeListArray.from_arrays(pa.array(experts), type=kind)
    replace_shard(place, with_column(table, "moe.1.experts", wrong))
    with pytest.raises(DataError, match=f"expert {value} is out of range; there are 6"):
        measured(place)


def test_an_expert_twice_is_refused(place: Path) -> None:
    table = first_shard(place)
    kind = table.schema.field("moe.1.experts").type
    experts = pa.array(np.full(2 * len(table), 3, dtype=np.int16))
    wrong = pa.FixedSizeListArray.from_arrays(experts, type=kind)
    replace_shard(place, with_column(table, "moe.1.experts", wrong))
    with pytest.raises(DataError, match="a token has an expert twice"):
        measured(place)


def test_tokens_and_domains_out_of_range_are_refused(place: Path, tmp_path: Path) -> None:
    table = first_shard(place)
    for name, kind, value in (("input", np.int32, 11), ("domain", np.int16, 2)):
        wrong = pa.array(np.full(len(table), value, dtype=kind))
        replace_shard(place, with_column(table, name, wrong))
        step = "vocabulary" if name == "input" else "domains"
        assert analyze_routing([step, "--input", str(place), "--output", str(tmp_path / "o")]) == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("moe.0.counts", -1, "column moe.0.counts has a negative number"),
        ("moe.0.scores", np.nan, "column moe.0.scores has a number that is not finite"),
        ("moa.1.entropy", np.inf, "column moa.1.entropy has a number that is not finite"),
        ("tokens", -5, "column tokens has a negative number"),
        ("domain", 2, "domain 2 is out of range"),
    ],
)
def test_wrong_numbers_of_windows_are_refused(
    name: str, value: float, message: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    path = window_path(place, 0)
    table = pq.read_table(path)
    kind = table.schema.field(name).type
    is_list = pa.types.is_fixed_size_list(kind)
    width, number = (kind.list_size, kind.value_type) if is_list else (1, kind)
    flat = pa.array(np.full(width * len(table), value, dtype=number.to_pandas_dtype()))
    wrong = pa.FixedSizeListArray.from_arrays(flat, type=kind) if is_list else flat
    pq.write_table(with_column(table, name, wrong), path, compression="none")
    described = describe_file(path)
    change(place, lambda values: values["shards"][0].update(window_file=described))
    given = ["load", "--input", str(place), "--output", str(tmp_path / "out")]
    assert analyze_routing(given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + struct.pack("<I", 1 << 30) + b"PAR1"])
def test_what_is_no_parquet_is_refused(place: Path, content: bytes) -> None:
    path = token_path(place, 0)
    path.write_bytes(content)
    described = {**describe_file(path), "bytes": max(1, len(content))}
    change(place, lambda values: values["shards"][0].update(token_file=described))
    with pytest.raises(DataError, match=r"cannot be read as Parquet|is not the file"):
        measured(place)


def test_a_truncated_page_is_refused(place: Path) -> None:
    path = token_path(place, 0)
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(bytes(content))
    described = describe_file(path)
    change(place, lambda values: values["shards"][0].update(token_file=described))
    with pytest.raises(DataError, match=r"cannot be read as Parquet|out of range|gaps|cut off"):
        for _ in Collection(place).tokens("domain", "input", "moe.1.experts"):
            pass


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda values: values.update(format=2), r"format is 2; it must be 1"),
        (lambda values: values.update(routers=[]), "routers is .*at least one router"),
        (lambda values: values["routers"][0].update(topk=7), "topk must be at most num_experts"),
        (
            lambda values: values["routers"][1].update(kind="../x"),
            r"routers\[1\].kind is '../x'; it must be moe or moa",
        ),
        (
            lambda values: values["shards"][2].update(tokens=1 << 40),
            r"shards\[2\].tokens is 1099511627776; it must be from 1",
        ),
        (
            lambda values: values["shards"][0]["token_file"].update(sha256="x"),
            r"shards\[0\].token_file.sha256 is 'x'",
        ),
        (lambda values: values.update(vocab_size=True), "vocab_size is True; it must be of type"),
        (lambda values: values.update(is_complete=False), "is not complete: 3 shards are there"),
    ],
)
def test_a_wrong_manifest_is_refused(place: Path, edit: Any, message: str) -> None:
    change(place, edit)
    with pytest.raises(DataError, match=message):
        Collection(place)


def test_what_is_no_collection_is_refused(tmp_path: Path, capsys: Any) -> None:
    given = ["load", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    assert analyze_routing(given) == 2
    assert (
        "an input is a directory that `analyze_routing.py collect` wrote" in capsys.readouterr().err
    )
    (tmp_path / NAME).write_text("[" * 100_000)
    with pytest.raises(DataError, match="is not JSON"):
        Collection(tmp_path)


def test_checkpoints_of_another_architecture_cannot_be_compared(
    place: Path, tmp_path: Path
) -> None:
    for name, changes, message in (
        ("experts", {"routers": routers(5, 2)}, "routers moe 2 layers of 5 experts, k 2"),
        ("layers", {"routers": routers(6, 2, layers=1)}, "routers moe 1 layers"),
        ("vocabulary", {"vocab_size": 12}, "vocabulary 12 against 11"),
        ("precision", {"precision": "bf16"}, "rounding changes what is chosen"),
        ("text", {"text_seed": 9}, "the same tokens must be compared"),
    ):
        write_collection(tmp_path / name, iteration=1, **changes)
        with pytest.raises(DataError, match=message):
            measure_saturation([Collection(tmp_path / name), Collection(place)])
        with pytest.raises(DataError, match="cannot be compared with"):
            require_comparable([Collection(place), Collection(tmp_path / name)])
    with pytest.raises(DataError, match="compares checkpoints, and 1 is given"):
        measure_saturation([Collection(place)])
    place_less: dict[str, Any] = {"source_kind": "hf", "consumed_tokens": -1}
    write_collection(tmp_path / "main", iteration=0, **place_less)
    with pytest.raises(DataError, match="has no place among checkpoints; give its directory"):
        measure_saturation([Collection(tmp_path / "main"), Collection(place)])
    with pytest.raises(DataError, match="two collections are of iteration 5"):
        measure_saturation([Collection(place), Collection(place)])


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the model has no experts"):
        routers_of({})


def test_an_interrupted_collection_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    write_collection(whole)

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        real, calls = ShardWriter.write, []

        def write(self: Any, *given: Any) -> Any:
            calls.append(1)
            return die() if len(calls) == 3 else real(self, *given)

        patch.setattr(ShardWriter, "write", write)
        with pytest.raises(Killed):
            write_collection(begun)
    with pytest.raises(DataError, match="is not complete: 2 shards are there"):
        Collection(begun)
    # Files of a shard that the manifest does not list are written again.
    token_path(begun, 2).write_bytes(b"half")

    with pytest.MonkeyPatch.context() as patch:
        real = ShardWriter.write

        def skip(self: Any, windows: Any, parts: Any) -> Any:
            return 0 if self.is_finished(windows) else real(self, windows, parts)

        patch.setattr(ShardWriter, "write", skip)
        write_collection(begun)
    assert json.loads((begun / NAME).read_text()) == json.loads((whole / NAME).read_text())
    for path in whole.iterdir():
        assert (begun / path.name).read_bytes() == path.read_bytes()
        assert {each.name for each in begun.iterdir()} == {each.name for each in whole.iterdir()}
    with pytest.raises(ConfigError, match=r"shard 0 of .* is of another text than is given now"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ShardWriter, "write", skip)
            write_collection(begun, text_seed=4)
    with pytest.raises(ConfigError, match=r"other settings \(model_hash: 000.* 1 now"):
        ShardWriter(begun, settings(model_hash="1"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no manifest"):
        ShardWriter(tmp_path / "full", settings())


class Letters:
    """A tokenizer of letters, whose document ends with 0."""

    eod = 0

    def encode_document(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") + 1 for letter in text]


def test_documents_are_cut_into_windows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "abc"}\n{"text": ""}\n{"text": "de"}\n')
    domain = Domain(name="a", path=str(file), is_tokens=False)
    tokenizer: Any = Letters
    blocks = list(token_blocks(domain, key="text", vocab_size=30, tokenizer=tokenizer))
    assert [block.tolist() for block in blocks] == [[1, 2, 3, 0], [4, 5, 0]]
    for length, limit, expected in (
        (3, None, [([1, 2, 3], 0), ([0, 4, 5], 0), ([0], -1)]),
        (7, None, [([1, 2, 3, 0, 4, 5, 0], -1)]),
        (2, 3, [([1, 2], 3), ([3, 0], 4)]),
    ):
        windows = list(cut_windows(blocks, domain=0, length=length, limit=limit))
        assert [(window.tokens.tolist(), window.following) for window in windows] == expected
    groups = list(group_windows(cut_windows(blocks, domain=0, length=2, limit=None), num_tokens=3))
    assert [len(group) for group in groups] == [2, 2]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["code.jsonl"], "is not NAME=PATH"),
        (["a/b=x"], "is not NAME=PATH"),
        (["a=x", "a=y"], "'a' is given twice"),
        (["all=x"], "'all' stands for all texts"),
        ([], "no text is given"),
    ],
)
def test_wrong_names_of_texts_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_domains(texts, [])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step5000-tokens20B", (5000, 20_000_000_000)),
        ("OLMoE-step1220000-tokens5117B", (1_220_000, 5_117_000_000_000)),
        ("step7", (7, -1)),
        ("OLMoE-1B-7B-0924", (0, -1)),
        ("step5-tokens2B-annealed", (0, -1)),
    ],
)
def test_names_of_checkpoints_say_how_far_they_are(name: str, expected: tuple[int, int]) -> None:
    assert position_of_name(name) == expected


def test_pyarrow_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pyarrow is not installed.*megatron-moe\[data\]"):
        check_pyarrow()
