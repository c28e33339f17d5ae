"""Hold evaluation to the harness's own `hf` model on the same weights, and to its promises."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moe_app.evaluate import evaluation as command
from moe_app.evaluate import lm_eval_cli
from moe_app.evaluate.workers import Workers
from tests.distributed.launcher import alone
from tests.unit.app.evaluate.make_evaluated import (
    LENGTH,
    TASKS,
    arguments,
    evaluate,
    write_model,
    write_tasks,
)
from tests.unit.app.evaluate.make_olmes import OLMES_ITEMS, write_olmes

# From the packages of the harness, from torch when it reads a checkpoint, and from megatron-core.
pytestmark = [
    pytest.mark.usefixtures("few_tasks"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


FAMILIES = ("olmoe", "jetmoe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family in both forms, tasks, and a cache of the harness's own."""
    patch = pytest.MonkeyPatch()
    where = tmp_path_factory.mktemp("evaluate")
    patch.setenv("HF_HOME", str(where / "cache"))
    write_tasks(where)
    for family in FAMILIES:
        write_model(where, family)
    return where


def samples(output: Path) -> dict[str, list[Any]]:
    """Return the answers to each item, in order, by task."""
    found = {}
    for task in TASKS:
        lines = (output / f"samples_{task}.jsonl").read_text().splitlines()
        items = sorted((json.loads(line) for line in lines), key=lambda item: item["doc_id"])
        found[task] = [answer[0] for item in items for answer in item["resps"]]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_scores_are_those_of_the_exported_model(
    folder: Path, family: str, tmp_path: Path
) -> None:
    assert evaluate(folder, family, tmp_path) == 0
    peer = HFLM(
        pretrained=str(folder / family),
        device="cpu",
        dtype="float32",
        batch_size=1,
        max_length=LENGTH,
    )
    expected = lm_eval.simple_evaluate(
        model=peer,
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    assert expected is not None
    found = samples(tmp_path)
    for task in TASKS:
        theirs = [
            answer[0]
            for item in sorted(expected["samples"][task], key=lambda item: item["doc_id"])
            for answer in item["resps"]
        ]
        if task == "words":
            assert found[task] == theirs
            assert any(theirs)
            continue
        if task == "texts":
            assert [float(each) for each in found[task]] == pytest.approx(theirs, rel=1e-5)
            continue
        assert [float(each[0]) for each in found[task]] == pytest.approx(
            [float(each[0]) for each in theirs], rel=1e-5
        )
        assert [str(each[1]) for each in found[task]] == [str(each[1]) for each in theirs]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    for task in TASKS:
        for key, value in expected["results"][task].items():
            if not isinstance(value, str):
                assert results[task][key] == pytest.approx(value, rel=1e-5), (task, key)


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(folder, "olmoe", tmp_path / "whole") == 0
    asked: list[int] = []
    compute = Workers._compute

    def counting(self: Workers, work: Any) -> Any:
        asked.append(len(work.prompts if hasattr(work, "prompts") else work.requests))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return compute(self, work)

    monkeypatch.setattr(Workers, "_compute", counting)
    small = ("--tokens-per-batch", "1", "--batch-size", "1")
    output = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, "olmoe", output, *small)
    assert not (output / "results.json").exists()
    with (output / command.ANSWERS_NAME).open("ab") as file:
        file.write(b'{"key": "half of a li')
    kept = sum(asked[:2])
    asked.clear()
    asked += [0, 0, 0]
    assert evaluate(folder, "olmoe", output, *small) == 0
    total = len((output / command.ANSWERS_NAME).read_text().splitlines()) - 1
    assert sum(asked) == total - kept
    whole, again = samples(tmp_path / "whole"), samples(output)
    assert again["words"] == whole["words"]
    for task in ("choices", "letters"):
        pairs = zip(again[task], whole[task], strict=True)
        assert all(float(a[0]) == pytest.approx(float(b[0]), rel=1e-5) for a, b in pairs)
    # A third start asks the model nothing, and gives the same files.
    before = (output / "samples_choices.jsonl").read_bytes()
    asked[:] = [0, 0, 0]
    assert evaluate(folder, "olmoe", output) == 0
    assert asked == [0, 0, 0]
    assert (output / "samples_choices.jsonl").read_bytes() == before


def test_a_killed_evaluation_goes_on_to_the_same_files(folder: Path, tmp_path: Path) -> None:
    """Passes of one request each, whose numbers do not depend on what was computed before."""
    worker = Path(__file__).with_name("kill_evaluation_worker.py")

    def run(before: str, name: str) -> int | None:
        small = ("--tokens-per-batch", "1", "--batch-size", "1")
        done = alone(worker, before, *arguments(folder, "olmoe", tmp_path / name, *small))
        return done.returncode

    assert run("0", "whole") == 0
    output = tmp_path / "killed"
    assert run("3", "killed") == -signal.SIGKILL
    assert not (output / "results.json").exists()
    kept = (output / command.ANSWERS_NAME).read_bytes()
    assert len(kept.splitlines()) > 1
    assert run("0", "killed") == 0
    assert (output / command.ANSWERS_NAME).read_bytes().startswith(kept)
    for task in TASKS:
        name = f"samples_{task}.jsonl"
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    results = [
        json.loads((tmp_path / name / "results.json").read_text())["results"]
        for name in ("whole", "killed")
    ]
    assert results[0] == results[1]


def test_olmes_requests_are_scored_as_the_exported_model_does(folder: Path, tmp_path: Path) -> None:
    made = write_olmes(tmp_path / "olmes")
    suite = ("--suite", "olmes", "--task-data", str(tmp_path))
    given = arguments(folder, "olmoe", tmp_path / "out", *suite)
    del given[given.index("--tasks") : given.index("--tasks") + 2]
    assert command.main(given) == 0
    peer = HFLM(pretrained=str(folder / "olmoe"), device="cpu", dtype="float32", batch_size=1)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    scores = []
    for name, (norm, items) in OLMES_ITEMS.items():
        right = {"rc": 0, "mc": 0}
        for form in right:
            records = made[f"{name}_{form}"]
            pairs = [tuple(record["request"].values()) for record in records]
            requests = [
                Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
                for pair in pairs
            ]
            theirs = [value for value, _ in peer.loglikelihood(requests, disable_tqdm=True)]
            lines = (tmp_path / "out" / f"samples_olmes_{name}_{form}.jsonl").read_text()
            for line, (_, choices, gold) in zip(lines.splitlines(), items, strict=True):
                asked, bare = zip(*(tuple(theirs[2 * n : 2 * n + 2]) for n in (0, 1)), strict=True)
                del theirs[:4]
                found = json.loads(line)
                assert found["log_probs"] == pytest.approx(asked, rel=1e-5)
                assert found["unconditional"] == pytest.approx(bare, rel=1e-5)
                by = {
                    "none": list(asked),
                    "char": [each / len(text) for each, text in zip(asked, choices, strict=True)],
                    "pmi": [a - b for a, b in zip(asked, bare, strict=True)],
                }[norm if form == "rc" else "none"]
                right[form] += by.index(max(by)) == gold
        scores.append(max(right.values()) / 2)
        assert results[f"olmes_{name}"]["score,none"] == scores[-1]
    assert results["olmes"] == {"score,none": pytest.approx(sum(scores) / 3), "tasks": 3}


def test_the_harness_command_line_finds_what_evaluate_does(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert evaluate(folder, "olmoe", tmp_path / "ours") == 0
    monkeypatch.setattr("sys.argv", ["pytest"])
    given = f"load={folder / 'olmoe-run'},seq_length={LENGTH},fp32=True,micro_batch_size=2"
    rest = ["--tasks", ",".join(TASKS), "--include_path", str(folder), "--output_path"]
    found = ["--model", "megatron_moe", "--model_args", given, *rest, str(tmp_path / "theirs")]
    assert lm_eval_cli.main([*found, "--log_samples"]) == 0
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    ours = json.loads((tmp_path / "ours" / "results.json").read_text())["results"]
    for task in TASKS:
        for key, value in ours[task].items():
            if isinstance(value, float) and "stderr" not in key:
                assert theirs[task][key] == pytest.approx(value, rel=1e-6), (task, key)
    found[3] = f"load={folder / 'olmoe-run'},num_layers=3"
    assert lm_eval_cli.main(found) == 2
    assert "--model_args has num_layers; known are bf16, ckpt_step" in capsys.readouterr().err
    assert lm_eval_cli.main(["--model", "hf", *rest, "x"]) == 2
    assert "this command runs megatron_moe alone" in capsys.readouterr().err


def test_draws_of_one_prompt_differ_and_repeat_with_the_seed(folder: Path, tmp_path: Path) -> None:
    task = json.loads((folder / "words.yaml").read_text())
    task |= {"task": "draws", "repeats": 4}
    task["generation_kwargs"] |= {"do_sample": True, "temperature": 1.0, "until": []}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "draws.yaml").write_text(json.dumps(task))
    more = ("--include-path", str(tmp_path / "tasks"), "--limit", "1")
    drawn = []
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        output = tmp_path / name
        assert evaluate(folder, "olmoe", output, *more, "--seed", seed, tasks="draws") == 0
        (line,) = (output / "samples_draws.jsonl").read_text().splitlines()
        drawn.append(json.loads(line)["resps"][0])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 4


@pytest.mark.parametrize(
    ("more", "tasks", "message"),
    [
        ([], "nothing_like_it", "no task is called 'nothing_like_it'; `lm-eval ls tasks` lists"),
        (["--include-path", "nowhere"], "words", "--include-path nowhere is no directory; it"),
        (["--prefix-token-id", "289"], "words", "--prefix-token-id is 289; the tokenizer has"),
        (["--max-length", "9"], "words", "a task asks for 9 new tokens, but the model has 9"),
        (["--gen-kwargs", "num_beams=4"], "words", "sets generation_kwargs num_beams, which"),
        ([], "humaneval", "humaneval is read from files alone; name the directory that has"),
        (["--num-fewshot", "1"], "mbpp", "--num-fewshot is 1, but the prompts of mbpp are those"),
        ([], "mt_bench,xstest", "mt_bench, xstest need a judge; name one with --judge-url"),
        (["--task-data", "nowhere"], "words", "--task-data nowhere is no directory; name"),
    ],
)
def test_bad_input_is_named(
    folder: Path,
    tmp_path: Path,
    more: list[str],
    tasks: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(folder, "olmoe", tmp_path, *more, tasks=tasks) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_answers_of_another_model_are_not_taken(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, "olmoe", tmp_path, tasks="letters") == 0
    assert evaluate(folder, "jetmoe", tmp_path, tasks="letters") == 2
    told = capsys.readouterr().err
    assert re.search(r"answers.jsonl has the answers of another model: its checkpoint is \w+", told)
