"""Check the command: what is kept and dropped, counts, bad lines, equal bytes however it runs."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.errors import DataError
from moe_app.data import train_tokenizer
from moe_app.filter import filter_data, report_data
from moe_app.filter.filter_data import main
from tests.paths import REPO
from tests.unit.app.filter import kill_worker

SOURCES = sorted((REPO / "megatron/trainer/data").glob("*.py"))
TEXTS = [path.read_text("utf-8") for path in SOURCES]


def write(path: Path, values: Sequence[dict[str, Any]]) -> Path:
    # Not as json.dumps would write them again: what is kept must be the line itself.
    path.write_text("".join(json.dumps(value, indent=None) + "  \n" for value in values))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run(output: Path, inputs: Sequence[Path], *filters: str, more: Sequence[str] = ()) -> None:
    names = [argument for each in filters for argument in ("--filter", each)]
    arguments = ["--input", *map(str, inputs), "--output", str(output), *names, *more]
    assert main(arguments) == 0


def digest(output: Path) -> dict[str, str]:
    paths = [*output.glob("kept/*"), *output.glob("dropped/*"), output / "summary.json"]
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = write(folder / "in.jsonl", [{"text": text} for text in TEXTS])
    arguments = ["--input", str(corpus), "--output-dir", str(folder), "--vocab-size", "400"]
    assert train_tokenizer.main([*arguments, "--tokenizer-type", "HFTokenizer"]) == 0
    return str(folder / "tokenizer.json")


def test_documents_are_kept_as_read_or_dropped_with_a_reason(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values: list[dict[str, Any]] = [
        {"text": TEXTS[0], "n": 1e2, "reason": "my own"},
        {"text": "q!" * 31 + " and so on, and on, to the end of it all", "n": 2},
        {"text": "q!" * 40 + " and so on, and on, to the end of it all", "n": 3, "reason": "mine"},
        {"text": "short", "n": 4},
        {"text": "a b c d e f g h i j k l m n o p", "max_stars_count": 1},
        {"text": "a b a b a b a c d e f g h i j k l m n o p" * 3, "max_stars_count": 2},
        {"text": TEXTS[1]},
    ]
    path = write(tmp_path / "in.jsonl", values)
    out = tmp_path / "out"
    filters = ["repeated-ngram", "length:min=10", "starcoder"]
    more = ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", tokenizer]
    run(out, [path], *filters, more=more)
    lines = path.read_bytes().splitlines(keepends=True)
    kept = (out / "kept/in.jsonl").read_bytes().splitlines(keepends=True)
    assert kept == [lines[0], lines[1], lines[5], lines[6]]
    dropped = read(out / "dropped/in.jsonl")
    assert [each["text"] for each in dropped] == [values[each]["text"] for each in (2, 3, 4)]
    assert [each["reason"] for each in dropped] == [
        "repeated-ngram: repeats",
        "length: too-short",
        "starcoder: stars",
    ]
    assert dropped[0]["input_reason"] == "mine"
    assert dropped[0]["detail"]["repeats"] == 40 // (dropped[0]["detail"]["period"] + 1) or (
        dropped[0]["detail"]["repeats"] >= 32
    )
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["documents"], summary["kept"], summary["dropped"]) == (7, 4, 3)
    assert [
        (each["name"], each["documents"], each["dropped"], each["reasons"])
        for each in summary["filters"]
    ] == [
        ("repeated-ngram", 7, 1, {"repeats": 1}),
        ("length", 6, 1, {"too-short": 1}),
        ("starcoder", 5, 1, {"stars": 1}),
    ]
    assert summary["filters"][1]["sample"][0]["line"] == 4
    assert summary["notes"] == {"starcoder: documents without a star count": 3}
    shown = capsys.readouterr().out
    assert re.search(r"^all +7 +4 +3 +0 bad lines skipped$", shown, re.M)


def test_dropped_line_is_the_line_that_was_read_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text":"a",  "n": 1.10, "m": 1e999}  \r\n')
    run(tmp_path / "out", [path], "length:min=2")
    line = (tmp_path / "out/dropped/in.jsonl").read_bytes()
    added = b', "reason": "length: too-short", "detail": {"characters": 1}}\n'
    assert line == path.read_bytes().rstrip()[:-1] + added


def near_copy(text: str) -> str:
    """Change one word in a hundred."""
    words = text.split(" ")
    words[::100] = ["changed"] * len(words[::100])
    return " ".join(words)


def deduplicate_paragraphs(texts: list[str]) -> list[str]:
    """Cut out paragraphs that were there before; each ends with the blank lines after it."""
    seen: set[str] = set()
    found = []
    for text in texts:
        parts = re.findall(r".+?(?:\n\s*\n|\Z)(?:\s*\n)*", text, re.S)
        new = []
        for each in parts:
            if each.strip() not in seen:
                new.append(each)
            seen.add(each.strip())
        found.append("".join(new))
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Write two files of real text with copies, near copies and evaluation texts planted."""
    first = [{"text": text} for text in TEXTS]
    second = [{"text": TEXTS[3]}, *({"text": near_copy(text)} for text in TEXTS[4:8])]
    second += [{"text": COMPOSED}, {"text": "x " + QUESTION + " y"}]
    second += [{"text": f"{' '.join(SOURCES[0].parts)} and much else. {QUESTION}"}]
    return [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)]


COMPOSED = "\n\n".join(["# new", *(text.split("\n\n")[0] for text in TEXTS[8:12])])
QUESTION = (
    "Which of these two rivers, the longer or the shorter one, ends in the sea of"
    " another country, and why?"
)


def test_comparing_filters_keep_the_first_and_name_it(tmp_path: Path, corpus: list[Path]) -> None:
    questions = [QUESTION.upper(), "?", f"{QUESTION} (as before)"]
    evaluation = write(tmp_path / "eval.jsonl", [{"question": each} for each in questions])
    out = tmp_path / "out"
    against = f"decontaminate:against={evaluation},key=question"
    run(out, corpus, "exact", "minhash", against, "exact:by=paragraph")
    left = deduplicate_paragraphs([*TEXTS, COMPOSED])
    assert [each["text"] for each in read(out / "kept/a.jsonl")] == left[:-1]
    assert [each["text"] for each in read(out / "kept/b.jsonl")] == left[-1:] == ["# new\n\n"]
    found = {
        each["text"]: (each["reason"], each["detail"]) for each in read(out / "dropped/b.jsonl")
    }
    assert found[TEXTS[3]] == ("exact: duplicate", {"first": f"{corpus[0]}:4"})
    for number in range(4, 8):
        reason, detail = found[near_copy(TEXTS[number])]
        assert (reason, detail["first"]) == ("minhash: near-duplicate", f"{corpus[0]}:{number + 1}")
    reason, detail = found[f"x {QUESTION} y"]
    assert reason == "decontaminate: overlap"
    places = [f"{evaluation}:{line}" for line in (1, 3)]
    assert detail["items"] == [{"item": place, "word": 1, "words": 13} for place in places]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["filters"][2]["evaluation_texts_met"] == 2
    assert summary["filters"][2]["most_met"] == [
        {"item": place, "documents": 2} for place in places
    ]
    assert summary["notes"]["decontaminate: evaluation texts too short to look for"] == 1
    assert not (out / "work/data").exists()


def test_same_bytes_from_one_worker_and_from_two(tmp_path: Path, corpus: list[Path]) -> None:
    for workers in ("1", "2"):
        out = tmp_path / workers
        run(out, corpus, "exact", "starcoder", more=["--workers", workers])
    assert digest(tmp_path / "1") == digest(tmp_path / "2")
    assert len(digest(tmp_path / "1")) == 5


def test_killed_worker_ends_the_command_instead_of_being_waited_for() -> None:
    from moe_app.filter.pipeline.executors import TaskProcesses

    doomed: Any = kill_worker.Doomed()
    with pytest.raises(DataError, match="a worker process was killed"), TaskProcesses(2) as workers:
        workers.run(doomed, [0, 1, 2])


def test_bad_line_stops_with_its_place_or_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write(tmp_path / "good.jsonl", [{"text": "a"}]), tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "first"}\n{"text": "\xff"}\n{"text": "last"}\n')
    out = tmp_path / "out"
    command = ["--input", str(good), str(bad), "--output", str(out), "--filter", "length:min=1"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"error: {bad}, line 2: not JSON" in error and "--max-bad-lines allows 0" in error
    assert [path.name for path in (out / "kept").iterdir()] == ["good.jsonl"]
    assert not (out / "summary.json").exists()
    assert main([*command, "--max-bad-lines", "1"]) == 0
    assert [each["text"] for each in read(out / "kept/bad.jsonl")] == ["first", "last"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["bad_lines"] == 1 and summary["bad_line_places"][0]["line"] == 2
    assert summary["documents"] == 3


def test_bad_lines_of_all_files_count_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{name}.jsonl").write_text('no\n{"text": ""}\n')
    command = ["--input", f"{tmp_path}/in", "--output", f"{tmp_path}/out", "--filter", "exact"]
    assert main([*command, "--max-bad-lines", "1"]) == 2
    assert "(2 bad lines so far; --max-bad-lines allows 1" in capsys.readouterr().err
    assert main([*command, "--max-bad-lines", "2"]) == 0


def test_finished_corpus_is_not_made_again(tmp_path: Path, corpus: list[Path]) -> None:
    out = tmp_path / "out"
    run(out, corpus, "exact")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*l") if path.is_file()}
    run(out, corpus, "exact")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def change_input(path: Path) -> None:
    path.write_text(path.read_text() + '{"text": "more"}\n')


@pytest.mark.parametrize(
    ("spec", "change", "named"),
    [("length:min=2", lambda path: None, "filters"), ("exact", change_input, "sources")],
)
def test_other_recipe_or_changed_input_is_refused_in_a_begun_folder(
    spec: str,
    change: Callable[[Path], None],
    named: str,
    tmp_path: Path,
    corpus: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    run(out, corpus, "exact")
    before = digest(out)
    change(corpus[0])
    command = ["--input", *map(str, corpus), "--output", str(out), "--filter", spec]
    assert main(command) == 2
    assert f"was begun with other {named};" in capsys.readouterr().err
    assert digest(out) == before


def test_folder_with_other_files_is_left_alone(
    tmp_path: Path, corpus: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--input", str(corpus[0]), "--output", str(tmp_path), "--filter", "exact"]
    assert main(command) == 2
    assert "holds files but no plan.json" in capsys.readouterr().err
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.json").write_text('{"format": 1, "filters": [{"exact": {"by": "__import__"}}]}')
    assert main([*command[:3], str(out), *command[4:]]) == 2
    assert "plan.json is not as this command writes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no filter is named"),
        (["--filter", "repeated-ngram"], "repeated-ngram counts tokens, but no tokenizer is named"),
        (["--filter", "exat"], "no filter is named 'exat'; did you mean 'exact'?"),
        (["--filter", "decontaminate:against=gone"], "--input gone does not exist"),
        (["--filter", "exact", "--input", "{}"], "is in --input {}, whose files are read"),
        (["--filter", "exact", "--output", "{}/a.jsonl"], "a.jsonl is no folder; name a new"),
    ],
)
def test_wrong_command_is_refused_before_anything_is_written(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    corpus: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = [each.format(tmp_path) for each in arguments]
    assert main(["--input", str(corpus[0]), "--output", str(out), *arguments]) == 2
    assert message.format(tmp_path) in capsys.readouterr().err
    assert not out.exists()


def test_full_disk_is_an_error_and_leaves_no_part_of_a_file(
    tmp_path: Path,
    corpus: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from moe_app.filter.pipeline import reading

    def fail(*arguments: object, **settings: object) -> bytes:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(reading, "kept_line", fail)
        command = ["--input", *map(str, corpus), "--output", str(out), "--filter", "length:min=1"]
        assert main(command) == 2
    error = capsys.readouterr().err
    assert f"--output {out} has no room left (No space left on device); make room" in error
    assert not list((out / "kept").iterdir()) and not list((out / "dropped").iterdir())
    assert main(command) == 0


@pytest.mark.parametrize("tool", [main, report_data.main], ids=["filter", "report"])
def test_output_that_cannot_be_written_is_named(
    tool: Callable[[list[str]], int],
    tmp_path: Path,
    corpus: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("no folder")
    command = ["--input", str(corpus[0]), "--output", str(tmp_path / "file/out")]
    assert tool([*command, *(["--filter", "exact"] if tool is main else [])]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and f"{tmp_path}/file/out" in message
    assert (tmp_path / "file").read_text() == "no folder"


def test_output_does_not_go_through_links(
    tmp_path: Path, corpus: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "kept").symlink_to(elsewhere)
    assert main(["--input", str(corpus[0]), "--output", str(out), "--filter", "exact"]) == 2
    assert "kept is a link; what is written must stay in --output" in capsys.readouterr().err
    assert not list(elsewhere.iterdir())


def test_missing_engine_is_named_with_its_extra(
    tmp_path: Path,
    corpus: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import sys

    for name in list(sys.modules):
        if name.startswith(("datatrove", "moe_app.filter.pipeline")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    command = ["--input", str(corpus[0]), "--output", str(tmp_path / "out"), "--filter", "exact"]
    assert main(command) == 2
    assert "pip install 'megatron-moe[data]'" in capsys.readouterr().err
    assert filter_data.main is main
