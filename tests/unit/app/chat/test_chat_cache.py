"""Tests that files are tokenized once, by whoever comes first, and what is refused."""

import gzip
import hashlib
import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron.trainer.errors import DataError
from moe_app.chat import chat_cache, chat_rows
from moe_app.chat.chat_cache import TokenizerChoice, open_tokens_of
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.chat.dialogue import ChatKind
from moe_app.chat.token_store import MANIFEST, TokenStore
from moe_app.data.sources import CACHE_SUFFIX
from tests.unit.app.chat.make_chat import END, MARKED, make_tokenizer, write_rows

WORDS = [f"{'over ' * n}dog" for n in range(1, 9)]


def chat(answer: str, question: str = "the lazy fox") -> dict[str, Any]:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CHATS = [chat(word) for word in WORDS]
KTO: list[dict[str, Any]] = [
    {"prompt": f"fox {n // 2}", "completion": word, "label": n % 2 == 0}
    for n, word in enumerate(WORDS)
]


@pytest.fixture
def choice(tmp_path: Path) -> TokenizerChoice:
    make_tokenizer(tmp_path / "tokenizer")
    return TokenizerChoice(
        tokenizer_type="HFTokenizer", tokenizer_model=str(tmp_path / "tokenizer")
    )


def read(
    path: str,
    choice: TokenizerChoice,
    kind: ChatKind = "sft",
    *,
    length: int = 200,
    **settings: Any,
) -> TokenStore:
    cfg = ChatDataConfig(**settings)
    return open_tokens_of([path], kind, cfg, choice, seq_length=length, flag="--train-data")


def texts(store: TokenStore, choice: TokenizerChoice) -> list[tuple[str, str]]:
    """Each text, and what of it counts."""
    tokenizer = choice.tokenizer
    found = (store.read(n) for n in range(store.num_texts))
    return [
        (tokenizer.decode(ids.tolist()), tokenizer.decode(ids[counted == 1].tolist()))
        for ids, counted in found
    ]


def olmoe(answer: str, question: str = "the lazy fox") -> tuple[str, str]:
    return f"{END}<|user|>\n{question}\n<|assistant|>\n{answer}{END}", f"{answer}{END}"


def test_formats_of_files_hold_the_same(tmp_path: Path, choice: TokenizerChoice) -> None:
    plain = write_rows(tmp_path / "a.jsonl", CHATS)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    table = pa.Table.from_pylist(CHATS)
    parquet.write_table(table, tmp_path / "c.parquet")
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    with pa.OSFile(str(dataset / "data.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (dataset / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": None})
    )
    expected = [olmoe(word) for word in WORDS]
    for path in (plain, str(packed), str(tmp_path / "c.parquet"), str(dataset)):
        assert texts(read(path, choice, data_cache=str(tmp_path / "cache")), choice) == expected


def test_several_processes_make_the_tokens_of_one(tmp_path: Path, choice: TokenizerChoice) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(300):  # several messages for each process
        answer = "over " * (number % 7) + "dog" * (1 + 200 * (number % 50 == 9))
        rows.append(
            {"prompt": f"fox {number // 3}", "completion": answer, "label": number % 2 == 0}
        )
    rows[70] = {"prompt": "no", "completion": "answer"}
    rows[200] = {"prompt": "no", "completion": 3, "label": True}
    path = write_rows(tmp_path / "a.jsonl", rows)
    stores = [
        read(
            path,
            choice,
            "kto",
            length=60,
            max_bad_rows=2,
            tokenize_workers=workers,
            data_cache=str(tmp_path / f"cache{workers}"),
        )
        for workers in (1, 2)
    ]
    one, two = stores
    assert one.facts == two.facts and one.fingerprint == two.fingerprint
    assert one.facts["overlong"] > 0 and [line[-40:] for line in one.facts["shown"]]
    for name in ("tokens", "counted", "ends", "labels"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


def test_dataset_of_several_splits_is_refused(tmp_path: Path, choice: TokenizerChoice) -> None:
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"splits train, test; only one.*both/train"):
        read(str(tmp_path / "both"), choice)


def test_pairs_are_chosen_then_rejected(tmp_path: Path, choice: TokenizerChoice) -> None:
    rows = [{"prompt": "q", "chosen": a, "rejected": b} for a, b in itertools.pairwise(WORDS)]
    store = read(write_rows(tmp_path / "a.jsonl", rows), choice, "preference")
    flat = [row[name] for row in rows for name in ("chosen", "rejected")]
    assert texts(store, choice) == [olmoe(answer, "q") for answer in flat]


def test_mismatched_answers_are_those_of_other_prompts(
    tmp_path: Path, choice: TokenizerChoice
) -> None:
    store = read(write_rows(tmp_path / "a.jsonl", KTO), choice, "kto")
    found = texts(store, choice)
    assert found[:8] == [olmoe(row["completion"], row["prompt"]) for row in KTO]
    assert store.labels.tolist() == [1, 0] * 4
    for row, (text, counted) in zip(KTO, found[8:], strict=True):
        answer = counted.removesuffix(END)
        assert text == olmoe(answer, row["prompt"])[0]
        (other,) = (each for each in KTO if each["completion"] == answer)
        assert other["prompt"] != row["prompt"]
    again = read(
        write_rows(tmp_path / "b.jsonl", KTO), choice, "kto", data_cache=str(tmp_path / "c")
    )
    assert again.tokens.tolist() == store.tokens.tolist()
    with pytest.raises(DataError, match="there is only one row"):
        read(write_rows(tmp_path / "one.jsonl", KTO[:1]), choice, "kto")


def test_long_texts_are_dropped_cut_or_refused(tmp_path: Path, choice: TokenizerChoice) -> None:
    path = write_rows(tmp_path / "a.jsonl", CHATS)
    whole = read(path, choice)
    lengths = whole.lengths
    limit = int(lengths[4])
    dropped = read(path, choice, length=limit)
    assert dropped.lengths.tolist() == lengths[:5].tolist()
    assert (dropped.facts["rows"], dropped.facts["overlong"]) == (5, 3)
    cut = read(path, choice, length=limit, overlong="truncate")
    assert cut.lengths.tolist() == np.minimum(lengths, limit).tolist()
    assert cut.read(7)[0].tolist() == whole.read(7)[0][:limit].tolist()
    assert cut.facts["truncated"] == 3
    with pytest.raises(DataError, match=rf"line 6: has .* more than --seq-length {limit}"):
        read(path, choice, length=limit, overlong="error")
    # Where the prompt alone is too long, nothing of it would count.
    for overlong in ("drop", "truncate"):
        with pytest.raises(DataError, match=r"no row is left.*8 have more than"):
            read(path, choice, length=5, overlong=overlong)


def test_bad_rows_are_named_counted_and_skipped_to_a_number(
    tmp_path: Path, choice: TokenizerChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_app.chat.chat_files.MOST_ROW_BYTES", 1000)
    rows = [CHATS[0], "{", {"messages": [{"role": "user", "content": "x"}]}, chat("a" * 2000)]
    path = tmp_path / "a.jsonl"
    write_rows(path, [*rows, CHATS[1]])
    with path.open("ab") as file:
        file.write(b'{"messages": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not JSON.*--max-bad-rows 0"):
        read(str(path), choice)
    with pytest.raises(DataError, match=r"a\.jsonl, line 6: not JSON.*4 row.*--max-bad-rows 3"):
        read(str(path), choice, max_bad_rows=3)
    store = read(str(path), choice, max_bad_rows=4)
    assert texts(store, choice) == [olmoe(WORDS[0]), olmoe(WORDS[1])]
    assert "line 3: has no turn of an assistant" in store.facts["shown"][1]
    assert "line 4: has more than 1,000 bytes" in store.facts["shown"][2]
    # The tokens are there, but not for a run that allows fewer.
    with pytest.raises(DataError, match="--max-bad-rows 3"):
        read(str(path), choice, max_bad_rows=3)
    for name, content in (("empty", b""), ("blank", b"\n\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="no row is left"):
            read(str(tmp_path / name), choice)
    assert chat_rows.MOST_ROW_BYTES == 1 << 24


def test_tokens_are_made_once_for_what_they_follow_from(
    tmp_path: Path, choice: TokenizerChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = chat_cache.write_tokens

    def counting(path: Path, *args: Any, **kwargs: Any) -> None:
        made.append(path.name)
        real(path, *args, **kwargs)

    monkeypatch.setattr(chat_cache, "write_tokens", counting)
    path = write_rows(tmp_path / "a.jsonl", CHATS)
    prints = {read(path, choice).fingerprint, read(path, choice, packing=False).fingerprint}
    assert len(made) == len(prints) == 1
    prints |= {
        read(path, choice, length=100).fingerprint,
        read(path, choice, template="zephyr").fingerprint,
        read(path, choice, train_on="all").fingerprint,
    }
    write_rows(tmp_path / "a.jsonl", CHATS[:-1])
    prints |= {read(path, choice).fingerprint}
    make_tokenizer(tmp_path / "tokenizer", tokenizer_config={"pad_token": "<|im_end|>"})
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    prints |= {read(path, choice).fingerprint}
    assert len(made) == len(prints) == 6
    names = {each.name for each in Path(f"{path}{CACHE_SUFFIX}").iterdir()}
    assert sum(name.endswith(".lock") for name in names) == 6 and len(names) == 12


@pytest.mark.parametrize("cache", [None, "data"])
def test_tokens_in_a_folder_of_data_are_no_data(
    cache: str | None, tmp_path: Path, choice: TokenizerChoice
) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "a.jsonl", CHATS)
    settings: dict[str, Any] = {} if cache is None else {"data_cache": str(tmp_path / cache)}
    for path in (tmp_path / "data", tmp_path / "data" / "**" / "*.json*"):
        found = [read(str(path), choice, **settings).fingerprint for _ in range(2)]
        assert found[0] == found[1]


def test_a_bad_row_is_quoted_in_brief(tmp_path: Path, choice: TokenizerChoice) -> None:
    long = "A" * (2 << 20)  # more than a manifest may have
    turns = [{"role": long, "content": "x"}, {"role": "assistant", "content": "y"}]
    path = write_rows(tmp_path / "a.jsonl", [*CHATS, {long: 1}, {"messages": turns}])
    for _ in range(2):
        facts = read(path, choice, max_bad_rows=2).facts
        assert facts["bad"] == 2 and max(map(len, facts["shown"])) < 2000


def test_answers_that_the_template_writes_alike_are_a_bad_row(
    tmp_path: Path, choice: TokenizerChoice
) -> None:
    source = MARKED.replace("message['content']", "message['content'] | trim")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(source)
    rows = [{"prompt": "x", "chosen": "a", "rejected": other} for other in ("a ", "b")]
    path = write_rows(tmp_path / "a.jsonl", rows)
    store = read(path, choice, "preference", template="tokenizer", overlong="error", max_bad_rows=1)
    assert (store.facts["rows"], store.facts["bad"], store.facts["overlong"]) == (1, 1, 0)


def test_mismatched_text_has_tokens_that_count_if_any_has(
    tmp_path: Path, choice: TokenizerChoice
) -> None:
    # With the long prompt no answer fits; of the first one, what counts would be cut off.
    talk = (("assistant", "dog"), ("user", "the " * 10), ("assistant", "lazy"))
    turns = [{"role": role, "content": content} for role, content in talk]
    rows = [
        {"prompt": "over " * 20, "completion": "a", "label": True},
        {"prompt": "fox", "completion": "a", "label": True},
        {"prompt": "dog", "completion": turns, "label": False},
        {"prompt": "the", "completion": "lazy " * 40, "label": False},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    store = read(path, choice, "kto", length=80, train_on="last")
    ids, counted = store.read(4)
    assert len(ids) == 80 and counted.sum() > 30


def test_what_a_killed_process_left_is_taken_away(tmp_path: Path, choice: TokenizerChoice) -> None:
    path = write_rows(tmp_path / "a.jsonl", CHATS)
    first = read(path, choice)
    left = first.path.with_name(f"{first.path.name}.tmp-host-1")
    first.path.rename(left)
    assert read(path, choice).fingerprint == first.fingerprint
    assert not left.exists() and first.path.is_dir()
    shutil.rmtree(first.path.parent)


def test_those_who_come_at_once_wait_for_the_first(
    tmp_path: Path, choice: TokenizerChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    entered = threading.Event()
    real = chat_cache.write_tokens

    def slow(*args: Any, **kwargs: Any) -> None:
        made.append(1)
        entered.set()
        barrier.wait(timeout=300)
        real(*args, **kwargs)

    barrier = threading.Barrier(2)
    monkeypatch.setattr(chat_cache, "write_tokens", slow)
    path = write_rows(tmp_path / "a.jsonl", CHATS)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(read(path, choice).fingerprint))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert entered.wait(timeout=300)
    barrier.wait(timeout=300)
    for thread in threads:
        thread.join(timeout=300)
    assert len(made) == 1 and len(found) == 3 and len(set(found)) == 1


def damage(store: Path) -> Iterator[tuple[str, str]]:
    """Change a store in one way after the other; yield what and the expected problem."""
    saved = {each.name: each.read_bytes() for each in store.iterdir()}
    manifest = json.loads(saved[MANIFEST])

    def restored(name: str, content: bytes) -> None:
        for each, before in saved.items():
            (store / each).write_bytes(before)
        (store / name).write_bytes(content)

    tokens = saved["tokens.bin"]
    for name, content, problem in (
        ("tokens.bin", tokens[:-4], "tokens.bin was changed"),
        ("tokens.bin", b"\1" + tokens[1:], "tokens.bin was changed"),
        (MANIFEST, b"{", "is not JSON"),
        (MANIFEST, b"[]", "describes no arrays"),
        (MANIFEST, json.dumps(manifest | {"version": 99}).encode(), "version 1"),
        (MANIFEST, json.dumps(manifest | {"facts": {"key": "x"}}).encode(), "is of 'x'"),
    ):
        restored(name, content)
        yield name, problem
    # A manifest that agrees with wrong arrays.
    for name, values, problem in (
        ("tokens", np.full(len(tokens) // 4, 1 << 20, "<i4"), "the vocabulary"),
        ("ends", np.frombuffer(saved["ends.bin"], "<i8")[::-1], "texts must have"),
        ("ends", np.frombuffer(saved["ends.bin"], "<i8")[:-1], "do not fit"),
        ("counted", np.full(len(tokens) // 4, 7, "|u1"), "other values"),
    ):
        content = values.tobytes()
        described = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        lying = manifest | {"arrays": manifest["arrays"] | {name: described}}
        restored(f"{name}.bin", content)
        (store / MANIFEST).write_text(json.dumps(lying))
        yield f"{name}.bin", problem
    restored(MANIFEST, saved[MANIFEST])
    (store / "tokens.bin").unlink()
    yield "tokens.bin", "cannot be read"


def test_damaged_tokens_are_refused(tmp_path: Path, choice: TokenizerChoice) -> None:
    path = write_rows(tmp_path / "a.jsonl", CHATS)
    store = read(path, choice).path
    for _, problem in damage(store):
        with pytest.raises(DataError, match=rf"(?s){problem}"):
            read(path, choice)


def test_place_that_cannot_be_written_is_named_with_a_remedy(
    tmp_path: Path, choice: TokenizerChoice
) -> None:
    path = write_rows(tmp_path / "a.jsonl", CHATS)
    Path(f"{path}{CACHE_SUFFIX}").write_text("a file is in the way")
    with pytest.raises(DataError, match=r"tokens cannot be kept in .*--data-cache"):
        read(path, choice)
    assert read(path, choice, data_cache=str(tmp_path / "elsewhere")).num_texts == 8


def test_tokens_that_are_there_need_no_right_to_write(
    tmp_path: Path, choice: TokenizerChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.jsonl", CHATS)
    first = read(path, choice)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert read(path, choice).fingerprint == first.fingerprint
