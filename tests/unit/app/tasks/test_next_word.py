"""Holds the quickstart's questions to what a small corpus is known to contain."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.errors import DataError
from moe_app.tasks.items import read_tasks
from tests.paths import REPO

SCRIPT = REPO / "examples/quickstart/next_word.py"
FILLER = [f"word{number}," for number in range(25)]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("next_word", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_question_is_each_word_of_prose_after_enough_words(script: ModuleType) -> None:
    text = " ".join([*FILLER[:19], "is", "held\nback here, a f(x) one Twice over."])
    found = [(each.answer, each.context.split()) for each in script.questions([text])]
    # `is` stands too early, `a` has one letter, `one` follows code, `Twice` is a name.
    words = text.split()
    assert found == [("held", words[:20]), ("here", words[:22]), ("over", words[3:27])]


RANKED = "the that cat sentence mat never sat training on saw".split()


def test_items_are_what_training_does_not_have(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "COMMON", 3)
    monkeypatch.setattr(script, "NEAR", 6)
    shared = " ".join([*FILLER, "a sentence that both of them have"])
    own = " ".join([*FILLER[::-1], "a sentence that training never saw."])
    # The first word stands there 20 times, the last one twice.
    frequent = " ".join(word for n, word in enumerate(RANKED) for _ in range(20 - 2 * n))
    train = [f"A {frequent} .", f"# {shared}".replace(" ", "\n    ")]
    texts = {
        "docs": script.Texts(train=train[:1], held_back=[shared, own]),
        "code": script.Texts(train=train[1:], held_back=[own]),
    }
    items = script.make_items(texts, name="docs")
    assert items == script.make_items(texts, name="docs")
    seen = " ".join(" ".join(train).split())
    # `saw` is rare, and what `shared` has is in the code.
    assert {item["answer"] for item in items} == {"sentence", "that", "training", "never"}
    for item in items:
        words = [*item["context"].split(), item["answer"]]
        assert 20 <= len(words) - 1 <= 24
        assert " ".join(words) in " ".join(own.split()) and " ".join(words[-8:]) not in seen
        assert len(set(item["choices"])) == 4 and item["choices"].count(item["answer"]) == 1
        ranks = {word: RANKED.index(word) for word in item["choices"]}
        at = ranks[item["answer"]]
        assert all(at - 3 <= rank <= max(at + 3, 6) for rank in ranks.values())
        assert item["is_most_frequent"] == (min(ranks.values()) == at)


def test_documents_are_divided_as_the_token_files_are(script: ModuleType, tmp_path: Path) -> None:
    lengths = {"docs": [5, 90, 3, 40, 2], "code": [70, 70, 60]}
    for name, each in lengths.items():
        with TokenFileWriter(str(tmp_path / f"{name}_text_document"), vocab_size=9) as writer:
            for length in each:
                writer.add_document([1] * length)
            writer.finish()
        lines = [json.dumps({"text": f"{name} {number}"}) for number in range(len(each))]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    recipe = tmp_path / "recipe.yaml"
    paths = [f"{tmp_path}/{name}_text_document" for name in ("code", "docs")]
    recipe.write_text(
        f"data_path: [0.7, {paths[0]}, 0.3, {paths[1]}]\nsplit: 70,30\nseq_length: 8\n"
    )
    found = script.read_texts(recipe)
    assert found["docs"].held_back == ["docs 3", "docs 4"] and len(found["docs"].train) == 3
    assert found["code"].held_back == ["code 2"]
    (tmp_path / "docs.jsonl").write_text("")
    with pytest.raises(DataError, match="has 0 documents, its token file 3 and 2"):
        script.read_texts(recipe)


def test_accuracies_stand_beside_those_of_knowing_nothing(
    script: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "next_word.jsonl"
    item = {"context": "a", "choices": ["b", "c", "d", "e"], "answer": "c"}
    lines = [json.dumps({**item, "is_most_frequent": each}) for each in (True, False, False)]
    path.write_text("\n".join(lines) + "\n")
    assert len(read_tasks([str(path)], limit=None)[0].items) == 3
    records: list[dict[str, object]] = [
        {"iteration": 50, "valid_loss": {}, "task_accuracy": {"next_word": {"none": 0.5}}},
        {"iteration": 60, "lm_loss": 2.0},
        {"iteration": 100, "valid_loss": {}, "task_accuracy": {"next_word": {"none": 0.75}}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    assert [line.split()[-1] for line in script.describe_accuracy(tmp_path, path)] == [
        *("25.0%", "33.3%"),
        *("50.0%", "75.0%"),
    ]
