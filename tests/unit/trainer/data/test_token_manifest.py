"""A manifest beside a token file says what wrote it, and is held against the run and the file."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.data.indexed import TokenFacts, open_tokens
from megatron.trainer.data.token_manifest import (
    TokenManifest,
    check_manifests,
    manifest_path,
    read_manifest,
    write_manifest,
)
from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.errors import DataError

SHA = "c51e455b41df6c017327e16001dd064b8b6733faeaa69b23d9bd79c8079237d5"  # of `tokens`


def write(prefix: Path, *, last: int = 3) -> str:
    with TokenFileWriter(str(prefix), vocab_size=100) as writer:
        for ids in ([1, 2, 0], [last, 0]):
            writer.add_document(ids)
        writer.finish()
    return str(prefix)


def with_manifest(prefix: Path, **changes: Any) -> str:
    path = write(prefix)
    manifest = TokenManifest(
        tokenizer_type="HFTokenizer",
        tokenizer_file="tokenizer.json",
        tokenizer_sha256=SHA,
        vocab_size=100,
        eod_token_id=0,
        num_input_files=1,
        num_text_bytes=9,
        num_empty_documents=0,
        **dataclasses.asdict(open_tokens(path).facts),
    )
    write_manifest(path, dataclasses.replace(manifest, **changes))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A file whose digest the manifests have; nothing looks into it."""
    path = tmp_path / "any_name.json"
    path.write_text("tokens")
    return str(path)


def check(*prefixes: str, **changes: Any) -> list[str]:
    facts: Mapping[str, TokenFacts] = {each: open_tokens(each).facts for each in prefixes}
    fields: dict[str, Any] = {
        "tokenizer_type": "HFTokenizer",
        "tokenizer_model": None,
        "vocab_size": 100,
        "eod": None,
    }
    return check_manifests(facts, **{**fields, **changes})


def test_manifest_is_read_back_and_agrees_wherever_its_files_are(
    tmp_path: Path, tokenizer: str
) -> None:
    prefix = with_manifest(tmp_path / "a")
    (tmp_path / "moved").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        os.replace(f"{prefix}{suffix}", tmp_path / "moved" / f"b{suffix}")
    moved = f"{tmp_path}/moved/b"
    found = read_manifest(moved)
    assert found is not None
    assert found.facts == open_tokens(moved).facts
    assert (found.vocab_size, found.eod_token_id, found.num_documents) == (100, 0, 2)
    assert check(moved, tokenizer_model=tokenizer, eod=0) == []
    # In the place of its tokenizer a directory may be named, as for everything else.
    os.replace(tokenizer, tmp_path / "moved" / "tokenizer.json")
    assert check(moved, tokenizer_model=f"{tmp_path}/moved") == []


def test_files_without_a_manifest_are_taken_and_said(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), with_manifest(tmp_path / "b")
    # Without a manifest there is nothing to compare a tokenizer with, and it is not read.
    assert check(first, tokenizer_model="missing") == [
        f"which tokenizer wrote the token files is not known: there is no {first}.json"
    ]
    assert check(first, second) == check(first)


def test_another_tokenizer_is_refused(tmp_path: Path, tokenizer: str) -> None:
    prefix = with_manifest(tmp_path / "a")
    Path(tokenizer).write_text("other")
    message = (
        f"{prefix} was written with tokenizer.json (HFTokenizer, SHA-256 {SHA[:16]}), but"
        f" the model's tokenizer is {tokenizer} (HFTokenizer, SHA-256 d9298a10d1b07358); ids mean"
        " what the tokenizer that wrote them says; give that one with --tokenizer-model, or"
        " preprocess the data with this one; if both give the same ids, remove"
        f" {prefix}.json"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        check(prefix, tokenizer_model=tokenizer)


def test_larger_vocabulary_than_the_models_is_refused(tmp_path: Path) -> None:
    prefix = with_manifest(tmp_path / "a")
    message = (
        f"{prefix} was written with a vocabulary of 100 ids (tokenizer.json), but the model has 99;"
        " it must have as many at least; raise --vocab-size, or preprocess the data with this"
        " model's tokenizer"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        check(prefix, vocab_size=99)
    assert check(prefix, vocab_size=128) == [], "a padded vocabulary is none of this"


def test_another_end_of_documents_is_refused(tmp_path: Path) -> None:
    prefix = with_manifest(tmp_path / "a")
    message = (
        f"documents of {prefix} were written with id 0 at their end, but this run takes 2 for it"
        " (--eod-token-id, or else the tokenizer's); both must be the same; give the id that was"
        " written, or preprocess the data again"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        check(prefix, eod=2)
    assert check(with_manifest(tmp_path / "b", eod_token_id=None), eod=2) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_tokens": 6}, "num_tokens: manifest 6, files 5"),
        ({"num_documents": 1}, "num_documents: manifest 1, files 2"),
        ({"dtype": "int32"}, "dtype: manifest int32, files uint16"),
        ({"fingerprint": SHA}, f"fingerprint: manifest {SHA[:16]}, files "),
    ],
)
def test_manifest_of_other_files_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    prefix = with_manifest(tmp_path / "a", **changes)
    message = f"{prefix}.json is not the manifest of {prefix}.bin and .idx: {said}"
    with pytest.raises(DataError, match=f"^{re.escape(message)}") as raised:
        check(prefix)
    assert str(raised.value).endswith(
        "; it must be of the very files; restore them, write them again with"
        " tools/preprocess_data.py, or remove the manifest"
    )


def test_exchanged_file_of_the_same_size_is_noticed_by_its_manifest(tmp_path: Path) -> None:
    prefix = with_manifest(tmp_path / "a")
    write(tmp_path / "b", last=4)
    for suffix in (".bin", ".idx"):
        os.replace(tmp_path / f"b{suffix}", f"{prefix}{suffix}")
    with pytest.raises(
        DataError, match=r"is not the manifest of .*: fingerprint: manifest \w{16},"
    ):
        check(prefix)


def test_files_that_are_written_anew_lose_the_manifest_of_the_old_ones(tmp_path: Path) -> None:
    prefix = with_manifest(tmp_path / "a")
    write(tmp_path / "a", last=4)
    assert not manifest_path(prefix).exists()


def valid(tmp_path: Path) -> dict[str, Any]:
    prefix = with_manifest(tmp_path / "valid")
    content: dict[str, Any] = json.loads(manifest_path(prefix).read_text())
    return content


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "it is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[" * 100_000, "it is not JSON: "),
        ("\xff", "it is not JSON: "),
        ("[]", "its format is not 'token file manifest'"),
        ('{"text": "a document"}', "its format is not 'token file manifest'"),
        ({"format_version": 2}, "its format_version is 2, not 1"),
        ({"num_tokens": -1}, "its num_tokens is -1"),
        ({"num_tokens": True}, "its num_tokens is True"),
        ({"vocab_size": "100"}, "its vocab_size is '100'"),
        ({"eod_token_id": 0.5}, "its eod_token_id is 0.5"),
        ({"tokenizer_sha256": None}, "its tokenizer_sha256 is None"),
    ],
)
def test_other_content_under_its_name_is_refused_and_never_replaced(
    tmp_path: Path, content: str | dict[str, Any], why: str
) -> None:
    prefix = write(tmp_path / "a")
    text = content if isinstance(content, str) else json.dumps({**valid(tmp_path), **content})
    manifest_path(prefix).write_text(text, encoding="latin-1")
    message = f"{prefix}.json stands where the manifest of a token file does, but is none: {why}"
    for work in (lambda: check(prefix), lambda: write(tmp_path / "a")):
        with pytest.raises(DataError, match=f"^{re.escape(message)}") as raised:
            work()
        assert str(raised.value).endswith("; rename or remove it")
    assert manifest_path(prefix).read_text(encoding="latin-1") == text


def test_pipe_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    os.mkfifo(manifest_path(prefix))
    with pytest.raises(DataError, match="it cannot be read: it is not a regular file"):
        check(prefix)
