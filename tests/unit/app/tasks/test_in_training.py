"""Hold the scores of a run's tasks to the harness's on its checkpoint, and to hand-made ones."""

import json
import math
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.inference.scoring import Continuation
from megatron.trainer.state import TrainState
from moe_app.evaluate import evaluation
from moe_app.pretrain import command
from moe_app.tasks import passes
from moe_app.tasks.items import read_tasks
from moe_app.tasks.passes import RowPasses, plan_rounds
from moe_app.tasks.rows import ItemRows, score_task
from tests.distributed.launcher import flags
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer

# From the packages of the harness, from torch when it reads a checkpoint, and from megatron-core.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

END = "<|endoftext|>"
ITEMS: list[dict[str, Any]] = [
    {"context": "the quick brown", "choices": ["fox", "lazy dog", "the", "jumps over"], "label": 0},
    {"context": "the lazy dog jumps", "choices": ["over", "é日本"], "answer": "é日本"},
    {"context": "", "choices": ["over the", "dog", "lazy the"], "label": 1},
    {"context": "fox " * 30 + "dog", "choices": ["dog", "over the", "."], "answer": 2},  # is cut
    {"context": "the fox is not", "choices": ["a dog", "lazy"], "label": 1},
]
SETTINGS: dict[str, Any] = {
    "num_layers": 2,
    "vocab_size": 320,
    "seq_length": 24,
    "train_iters": 4,
    "eval_interval": 2,
    "split": "80,20",
    "lr": 0.05,
    "tokenizer_type": "HFTokenizer",
}


def write_items(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the same settings, `plain` without tasks and `scored` with them."""
    torch.utils._device._device_constructors()
    where = tmp_path_factory.mktemp("in_training")
    tokenizer = make_hf_tokenizer(where, [END], tokenizer_config={"eos_token": END})
    write_items(where / "dogs.jsonl", ITEMS)
    write_items(where / "foxes.jsonl", [ITEMS[1], ITEMS[0]])
    given = {**SETTINGS, "tokenizer_model": tokenizer}
    assert command.main(flags(**given, device="cpu", save=where / "plain")) == 0
    assert command.main(scored(where, save=where / "scored")) == 0
    return where


def scored(folder: Path, **more: Any) -> list[str]:
    """Flags of a run with both tasks."""
    given = {**SETTINGS, "tokenizer_model": folder / "tokenizer.json", **more}
    tasks = [str(folder / "dogs.jsonl"), f"again={folder / 'foxes.jsonl'}"]
    return [*flags(**given, device="cpu"), "--eval-tasks", *tasks]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_is_bitwise_the_same_with_tasks(folder: Path) -> None:
    plain, scored = records(folder / "plain"), records(folder / "scored")
    added = {"task_accuracy", "task_bits_per_byte", "task_seconds"}
    assert [set(each) for each in plain] == [set(each) - added for each in scored]
    assert [record["iteration"] for record in scored if added & set(record)] == [2, 4]
    assert untimed(plain) == untimed(scored, *added)


def untimed(found: list[dict[str, Any]], *more: str) -> list[dict[str, Any]]:
    """Return records without what depends on time, and without more keys."""
    left_out = {"tokens_per_second", "model_tflops", "task_seconds", *more}
    return [{key: value for key, value in each.items() if key not in left_out} for each in found]


def test_run_stopped_in_a_pass_goes_on_as_one_that_was_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped at step 2, there again when it goes on, and at step 4; then it is finished."""
    rounds: Counter[int] = Counter()
    of_a_pass: set[int] = set()
    stop_after: tuple[int, int] | None = None
    run_schedule = passes.run_schedule

    def counted(state: TrainState, *arguments: Any, **more: Any) -> Any:
        found = run_schedule(state, *arguments, **more)
        tasks: Any = state.tasks
        of_a_pass.add(len(tasks.passes.rounds))
        rounds[state.iteration] += 1
        if (state.iteration, rounds[state.iteration]) == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(passes, "run_schedule", counted)
    given = scored(folder, save=tmp_path, load=tmp_path, requeue_exit_code=75)
    seen = []
    for stop_after in ((2, 2), (2, 1), (4, 2), None, None):
        rounds.clear()
        assert command.main(given) == (75 if stop_after else 0)
        seen.append(dict(rounds))
    (whole,) = of_a_pass
    assert whole > 3
    assert seen == [{2: 2}, {2: 1}, {2: whole, 4: 2}, {4: whole}, {}]
    assert untimed(records(tmp_path)) == untimed(records(folder / "scored"))


def offline(folder: Path, output: Path) -> tuple[dict[str, Any], list[list[float]]]:
    """Return the harness's results on the checkpoint, and each item's log-likelihoods."""
    task = {
        "task": "dogs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "offline.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    }
    output.mkdir()
    (output / "dogs.yaml").write_text(json.dumps(task))  # JSON is YAML
    # The harness puts its delimiter before a text without context, too; a run does not.
    rewritten = [
        {"context": item["context"], "choices": item["choices"], "gold": gold}
        for item, gold in zip(ITEMS, [0, 1, 1, 2, 1], strict=True)
        if item["context"]
    ]
    write_items(folder / "offline.jsonl", rewritten)
    given = ["--load", str(folder / "scored"), "--tasks", "dogs", "--include-path", str(output)]
    given += [
        "--tokenizer-type",
        "HFTokenizer",
        "--tokenizer-model",
        str(folder / "tokenizer.json"),
    ]
    assert evaluation.main([*given, "--output", str(output), "--bootstrap-iters", "0"]) == 0
    lines = (output / "samples_dogs.jsonl").read_text().splitlines()
    samples = sorted((json.loads(line) for line in lines), key=lambda each: each["doc_id"])
    results = json.loads((output / "results.json").read_text())["results"]["dogs"]
    return results, [[float(answer[0][0]) for answer in each["resps"]] for each in samples]


def test_scores_are_those_of_the_harness_on_the_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    found: list[list[float]] = []
    compute = RowPasses.log_probs

    def kept(self: RowPasses, state: TrainState, **more: Any) -> Any:
        values = compute(self, state, **more)
        found.append(values or [])
        return values

    monkeypatch.setattr(RowPasses, "log_probs", kept)
    items = [item for item in ITEMS if item["context"]]
    write_items(tmp_path / "dogs.jsonl", items)
    given = flags(
        **SETTINGS,
        device="cpu",
        tokenizer_model=folder / "tokenizer.json",
        save=tmp_path / "again",
        eval_tasks=tmp_path / "dogs.jsonl",
    )
    assert command.main(given) == 0
    expected, theirs = offline(folder, tmp_path / "offline")
    # The model's weights are those of the checkpoint: training is the same with other tasks.
    assert found[-1] == pytest.approx([value for each in theirs for value in each], abs=1e-5)
    last = records(tmp_path / "again")[-1]
    assert last["task_accuracy"]["dogs"]["none"] == expected["acc,none"]
    assert last["task_accuracy"]["dogs"]["char"] == expected["acc_norm,none"]
    bits = [
        -values[gold] / len(item["choices"][gold].encode()) / math.log(2)
        for item, values, gold in zip(items, theirs, [0, 1, 2, 1], strict=True)
    ]
    assert last["task_bits_per_byte"]["dogs"] == pytest.approx(sum(bits) / 4, rel=1e-5)
    assert last["task_seconds"] > 0


def alone(state: TrainState, row: Continuation) -> torch.Tensor:
    """Return the logits before a row's last tokens, by a pass over that row."""
    (model,) = state.modules
    model.eval()
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        logits: torch.Tensor = model(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None], None)
    return logits[0, -row.count :, :320]


def log_prob(logits: torch.Tensor, row: Continuation) -> float:
    labels = torch.tensor(row.ids[-row.count :])
    return float(logits.log_softmax(-1).gather(1, labels[:, None]).sum())


def test_row_has_the_log_probability_it_has_alone(
    folder: Path, make_state: Callable[..., TrainState]
) -> None:
    given = {**SETTINGS, "tokenizer_model": folder / "tokenizer.json"}
    state = make_state(**given, eval_tasks=folder / "dogs.jsonl", micro_batch_size=1)
    tasks: Any = state.tasks
    found = tasks.passes.log_probs(state)
    for row, value in zip(tasks.passes._rows, found, strict=True):
        assert value == pytest.approx(log_prob(alone(state, row), row), abs=1e-5)
    assert len(found) == 4 + 2 + 3 + 3 + 2


def test_row_in_bf16_is_as_near_to_fp32_as_its_digits_allow(
    folder: Path, make_state: Callable[..., TrainState]
) -> None:
    """The truth has the same weights, which are numbers of bf16, and computes in fp32."""
    given = {**SETTINGS, "tokenizer_model": folder / "tokenizer.json"}
    given |= {"eval_tasks": folder / "dogs.jsonl", "micro_batch_size": 1}
    state = make_state(**given, bf16=True)
    (model,) = state.modules
    weights = {
        key: value.float() if torch.is_tensor(value) else value
        for key, value in model.state_dict().items()
    }
    tasks: Any = state.tasks
    found = tasks.passes.log_probs(state)
    exact = make_state(**given)
    exact.modules[0].load_state_dict(weights)
    errors = []
    for row, value in zip(tasks.passes._rows, found, strict=True):
        logits = alone(exact, row)
        rounding = row.count * float(logits.abs().max()) * 2**-8  # of 8 bits, in every logit
        errors.append((value - log_prob(logits, row)) / rounding)
    # The layers before the logits round, too; an error of nothing would not be bf16.
    assert 1e-3 < max(map(abs, errors)) < 2


def test_figures_of_hand_made_log_probabilities() -> None:
    items = [
        # Log-probability, per character, per byte and against the bare context choose differently.
        ItemRows(first=0, gold=1, chars=(1, 4, 9), num_bytes=(1, 4, 30), bare_first=3),
        ItemRows(first=6, gold=0, chars=(2, 2, 2), num_bytes=(2, 4, 2), bare_first=9),
    ]
    values = [-2.0, -6.0, -9.0, -0.5, -5.5, -12.0, -3.0, -4.0, -5.0, -3.0, -9.0, -9.0]
    found = score_task(items, values)
    # First item: none 0; char -2 -1.5 -1 -> 2; byte -2 -1.5 -0.3 -> 2; pmi -1.5 -0.5 3 -> 2.
    # Second: none 0; char 0; byte -1.5 -1 -2.5 -> 1; pmi 0 5 4 -> 1.
    assert found.accuracy == {"none": 0.5, "char": 0.5, "byte": 0.0, "pmi": 0.0}
    assert found.bits_per_byte == pytest.approx((6 / 4 + 3 / 2) / 2 / math.log(2))
    values[7] = math.nan
    assert math.isnan(score_task(items, values).accuracy["none"])


def test_rounds_hold_every_row_once_and_are_alike_on_all_ranks() -> None:
    lengths = [5, 40, 3, 17, 8, 8, 9, 31, 2, 2, 2, 12, 40]
    for ranks, micro in ((1, 1), (2, 1), (3, 4)):
        rounds = plan_rounds(
            lengths, ranks=ranks, micro_batches=micro, tokens=80, width_step=8, longest=40
        )
        rows = [row for each in rounds for batch in each.micro_batches for row in batch]
        assert sorted(rows) == list(range(len(lengths)))
        for each in rounds:
            assert len(each.micro_batches) == ranks * micro
            assert all(len(batch) <= each.size for batch in each.micro_batches)
            assert each.size * each.width <= 80 and each.width % 8 == 0
            assert all(lengths[row] <= each.width for batch in each.micro_batches for row in batch)


GOOD = '{"context": "a", "choices": ["b", "c"], "label": 0}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"items\.jsonl, line 2: not JSON"),
        ('["a"]', r"items\.jsonl, line 2: a JSON list"),
        ('{"context": "a", "choices": ["b", "c"]}', r"line 2: has the keys \['choices', 'context"),
        ('{"context": 3, "choices": ["b", "c"], "label": 0}', r"line 2: 'context' is a int"),
        ('{"context": "a", "choices": ["b"], "label": 0}', r"line 2: 'choices' must be a list of"),
        ('{"context": "a", "choices": ["b", 4], "label": 0}', r"line 2: 'choice 1' is a int"),
        ('{"context": "a", "choices": ["b", ""], "label": 0}', r"line 2: choice 1 is empty"),
        ('{"context": "a", "choices": ["b", "c"], "label": 2}', r"line 2: 'label' is 2; it must"),
        ('{"context": "a", "choices": ["b", "c"], "label": true}', r"line 2: 'label' is True; it"),
        ('{"context": "a", "choices": ["b", "b"], "answer": "b"}', r"'answer' is 'b'; .* exactly"),
        (
            '{"context": "a", "choices": ["b", "c"], "label": 0, "answer": 1}',
            r"line 2: has both 'label' and 'answer'",
        ),
    ],
)
def test_bad_line_is_refused_with_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(GOOD + line + "\n")
    with pytest.raises(DataError, match=message):
        read_tasks([str(path)], limit=1)  # beyond the limit, too


def test_files_and_directories_are_named_and_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a directory without \.jsonl"):
        read_tasks([str(tmp_path)], limit=None)
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(GOOD * 3)
    (tmp_path / "notes.txt").write_text("no task")
    found = read_tasks([str(tmp_path), f"c={tmp_path / 'a.jsonl'}"], limit=2)
    assert [(task.name, len(task.items)) for task in found] == [("a", 2), ("b", 2), ("c", 2)]
    with pytest.raises(ConfigError, match="names two tasks 'a'"):
        read_tasks([str(tmp_path), str(tmp_path / "a.jsonl")], limit=None)
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        read_tasks([str(tmp_path / "nothing.jsonl")], limit=None)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl has no items"):
        read_tasks([str(tmp_path / "empty.jsonl")], limit=None)


def test_run_is_refused_before_it_trains(
    folder: Path, tmp_path: Path, make_state: Callable[..., TrainState]
) -> None:
    given = {key: value for key, value in SETTINGS.items() if key != "tokenizer_type"}
    with pytest.raises(ConfigError, match="--eval-tasks needs a tokenizer"):
        make_state(**given, eval_tasks=folder / "dogs.jsonl")
    long = write_items(tmp_path / "long.jsonl", [{**ITEMS[1], "choices": ["fox " * 30, "é日本"]}])
    given = {**SETTINGS, "tokenizer_model": folder / "tokenizer.json"}
    with pytest.raises(DataError, match=r"long\.jsonl, line 1: choice 'fox fox.* \(--seq-length\)"):
        make_state(**given, eval_tasks=long)
    with pytest.raises(ConfigError, match=r"the tokenizer has \d+ ids"):
        make_state(**{**given, "vocab_size": 100}, eval_tasks=folder / "dogs.jsonl")
    with pytest.raises(ConfigError, match=r"eval_tasks_limit \(0\) must be at least 1"):
        make_state(**given, eval_tasks=folder / "dogs.jsonl", eval_tasks_limit=0)
