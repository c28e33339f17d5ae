"""Generates and scores with a model that two ranks trained to memorise one sentence."""

import argparse
import json
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.trainer.checkpoint import FoundCheckpoint, find_checkpoint
from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.tokenizer import load_tokenizer
from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.errors import ConfigError, DataError
from moe_app.data import train_tokenizer
from moe_app.infer import generate, open_model, score
from tests.distributed.launcher import REPO, flags, ranks

# torch warns while it reads a checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")

VOCAB = 400
SENTENCE = "one two three four five six seven eight nine ten\n"
BOTH = ("tensor-model-parallel-size", "expert-model-parallel-size")
LAYOUT = {**dict.fromkeys(BOTH, 2), "expert-tensor-parallel-size": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run whose tokenizer is only in the checkpoint."""
    folder = tmp_path_factory.mktemp("generate")
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefgh", k=4)) for _ in range(500)]
    texts = [*[SENTENCE] * 50, " ".join(words)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--input", str(corpus), "--output-dir", str(folder), "--vocab-size", str(VOCAB)]
    assert train_tokenizer.main(arguments) == 0
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(folder / "tokenizer.model"))
    with TokenFileWriter(str(folder / "data"), vocab_size=VOCAB) as writer:
        for _ in range(300):
            writer.add_document([*tokenizer.encode(SENTENCE), tokenizer.eod])
        writer.finish()
    done = ranks(
        2,
        REPO / "tools" / "pretrain.py",
        *flags(
            **LAYOUT,
            data_path=folder / "data",
            tokenizer_model=folder / "tokenizer.model",
            vocab_size=VOCAB,
            save=folder / "run",
            seq_length=48,
            micro_batch_size=8,
            train_iters=50,
            lr=0.01,
            num_layers=2,
            log_interval=20,
        ),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "tokenizer.model").unlink()
    return folder / "run"


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Restore pytest's log handlers, which the tools replace."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # torch.device("meta") looks up its factories once; do so before they are redirected to the CPU.
    torch.utils._device._device_constructors()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def texts(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> tuple[str, str]:
    """Run generate; return its standard output and error."""
    capsys.readouterr()
    status = generate.main(["--load", str(run), "--max-new-tokens", "30", *arguments])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out, err


def test_memorised_text_is_continued_to_its_end(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = texts(capsys, run, "--greedy", "--prompt", "one two", "--prompt", "four five six")
    assert out == f"{SENTENCE}\n---\nfour five six seven eight nine ten\n\n"
    assert err.count("stopped at the end of the document") == 2


def test_greedy_text_does_not_depend_on_sampling_flags(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["--greedy", "--prompt", "return"]
    plain, _ = texts(capsys, run, *prompt)
    flagged, _ = texts(capsys, run, *prompt, "--seed", "9", "--temperature", "50", "--top-p", "0.1")
    assert plain == flagged


def test_sampled_text_follows_the_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = ["--temperature", "3", "--top-p", "1"]
    twice, _ = texts(capsys, run, *wild, "--prompt", "one", "--prompt", "one")
    again, _ = texts(capsys, run, *wild, "--prompt", "one", "--prompt", "one")
    first, second = twice.split("---\n")
    alone, _ = texts(capsys, run, *wild, "--prompt", "one")
    other, _ = texts(capsys, run, *wild, "--prompt", "one", "--seed", "2")
    assert twice == again
    assert first == alone
    assert first != second
    assert second == other  # the second prompt has the next seed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--prompt", ""],
            "ConfigError: --prompt number 1 ('') has no tokens; the model continues at least one;"
            " give it some text",
        ),
        (
            ["--prompt", "one", "--max-new-tokens", "48"],
            "ConfigError: --prompt number 1 has 1 tokens and --max-new-tokens is 48; together they"
            " must be at most 48, the --seq-length of training; shorten the prompt or lower"
            " --max-new-tokens",
        ),
        (
            ["--prompt", "one", "--max-new-tokens", "0"],
            "ConfigError: --max-new-tokens is 0; it must be at least 1; use 64, for example",
        ),
        (
            ["--prompt", "one", "--temperature", "0"],
            "ConfigError: --temperature is 0.0; it must be a finite number above 0; use 0.8, for"
            " example, or --greedy for the likeliest token each time",
        ),
        (
            ["--prompt", "one", "--top-k", "0"],
            "ConfigError: --top-k is 0; it must be at least 1; use 50, for example, or leave it out"
            " to draw from all tokens",
        ),
        (
            ["--prompt", "one", "--tensor-model-parallel-size", "2"],
            "ConfigError: 2 settings are wrong:\n"
            "- the number of ranks (1) must be a multiple of tensor_model_parallel_size x"
            " pipeline_model_parallel_size (2 x 1 = 2); start 2 ranks, or change these sizes\n"
            "- the number of ranks (1) must be a multiple of expert_tensor_parallel_size x"
            " expert_model_parallel_size x pipeline_model_parallel_size (2 x 1 x 1 = 2); start 2"
            " ranks, or change these sizes",
        ),
        (
            ["--prompt", "one\udcff"],
            "ConfigError: --prompt number 1 ('one\\udcff') is not UTF-8 at character 3; prompts"
            " must be valid UTF-8; re-encode it",
        ),
        (
            ["--prompt", "one", "--seed", "-1"],
            "ConfigError: --seed is -1; it must be 0 to 2^62, leaving room for one seed per"
            " prompt; use a smaller one",
        ),
        (
            ["--prompt", "one", "--top-p", "2"],
            "ConfigError: --top-p is 2.0; it must be above 0 and at most 1; use 0.95, for example,"
            " or 1 to draw from all tokens",
        ),
    ],
)
def test_wrong_flags_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert generate.main(["--load", str(run), "--max-new-tokens", "8", *arguments]) == 2
    told = re.sub(r"(?m)^.* documents end with .*\n", "", capsys.readouterr().err)
    assert told == f"{message}\n"


def test_missing_checkpoint_and_iteration_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--load", str(tmp_path), "--prompt", "one"]) == 2
    assert f"CheckpointError: no checkpoint in {tmp_path}" in capsys.readouterr().err
    assert generate.main(["--load", str(run), "--ckpt-step", "7", "--prompt", "one"]) == 2
    assert "has no checkpoint of iteration 7; it has 50" in capsys.readouterr().err


def arguments_of(**settings: str | None) -> argparse.Namespace:
    return argparse.Namespace(
        **{"tokenizer_type": None, "tokenizer_model": None, "eod_token": None, **settings}
    )


def test_run_without_a_tokenizer_needs_the_flag(tmp_path: Path) -> None:
    found = FoundCheckpoint(path=tmp_path / "iter_0000001", iteration=1)
    message = (
        f"{found.path} has no tokenizer, because its run had no --tokenizer-model; text needs"
        " one; name the tokenizer that made the training data with --tokenizer-model"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_model.find_tokenizer(DataConfig(), found, arguments_of())
    # A run on mock data saves no tokenizer, even when its config names one.
    mock = DataConfig(mock_data=True, tokenizer_model="tokenizer.json")
    with pytest.raises(ConfigError, match="has no tokenizer, because its data were --mock-data"):
        open_model.find_tokenizer(mock, found, arguments_of())


def test_lines_and_logits_need_different_files(tmp_path: Path) -> None:
    args = argparse.Namespace(output=f"{tmp_path}/a", logits=f"{tmp_path}/./a")
    with pytest.raises(ConfigError, match="--output and --logits are both"):
        score.check_logits(args, score.InputStats(num_lines=1, longest=2), 3)


def test_tokenizer_flag_overrides_the_checkpoints(run: Path, tmp_path: Path) -> None:
    found = find_checkpoint(run)
    data = DataConfig(tokenizer_model="/nowhere/tokenizer.model")
    assert open_model.find_tokenizer(data, found, arguments_of()).vocab_size == VOCAB
    missing = str(tmp_path / "other.model")
    with pytest.raises(DataError, match=re.escape(f"tokenizer {missing} does not exist")):
        open_model.find_tokenizer(data, found, arguments_of(tokenizer_model=missing))


def write_lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_completions_of_a_file_are_those_of_the_prompts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["one two", "return", "four five six"]
    wild = ["--temperature", "3", "--top-k", "20", "--batch-size", "2"]
    out, _ = texts(capsys, run, *wild, *(each for text in prompts for each in ("--prompt", text)))
    source = write_lines(
        tmp_path / "in.jsonl", *({"prompt": text, "id": i} for i, text in enumerate(prompts))
    )
    file = ["--input", str(source), "--output", str(tmp_path / "out.jsonl")]
    printed, _ = texts(capsys, run, *wild, *file)
    assert printed == ""
    records = read_lines(tmp_path / "out.jsonl")
    whole = [record["prompt"] + record["completion"] for record in records]
    assert "\n---\n".join(whole) == out.removesuffix("\n")
    assert [record["id"] for record in records] == [0, 1, 2]
    for record in records:
        assert len(record["completion_tokens"]) <= 30
        is_full = len(record["completion_tokens"]) == 30
        assert record["finish_reason"] == "length" or not is_full


def test_greedy_completion_of_memorised_text_stops(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "one two"})
    file = ["--input", str(source), "--output", str(tmp_path / "out.jsonl")]
    texts(capsys, run, "--greedy", *file)
    (record,) = read_lines(tmp_path / "out.jsonl")
    assert record["completion"] == SENTENCE.removeprefix("one two")
    assert record["finish_reason"] == "stop"


def test_line_that_cannot_be_continued_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "one"}, {"tokens": [5] * 41})
    output = tmp_path / "out.jsonl"
    file = ["--input", str(source), "--output", str(output), "--max-new-tokens", "8"]
    assert generate.main(["--load", str(run), *file]) == 2
    assert capsys.readouterr().err.endswith(
        f"DataError: {source}, line 2: 'tokens' has 41 tokens; at most 40 are allowed, because"
        " with --max-new-tokens 8 they must fit into 48, the --seq-length of training; shorten or"
        " split it\n"
    )
    source.write_text("")
    assert generate.main(["--load", str(run), *file]) == 2
    assert f"ConfigError: {source} has no lines" in capsys.readouterr().err
    assert not output.exists()


def run_score(run: Path, source: Path, *arguments: str) -> tuple[int, Path]:
    output = source.with_suffix(".scored")
    files = ["--input", str(source), "--output", str(output)]
    return score.main(["--load", str(run), *files, *arguments]), output


def test_memorised_text_is_likely_and_lines_keep_their_order(run: Path, tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "in.jsonl",
        {"text": "ten three nine one", "id": "odd"},
        {"text": SENTENCE, "id": "known"},
        {"tokens": [7], "id": "short"},
    )
    logits_file = tmp_path / "logits.npy"
    status, output = run_score(run, source, "--logits", str(logits_file))
    assert status == 0
    odd, known, short = read_lines(output)
    assert [odd["id"], known["id"], short["id"]] == ["odd", "known", "short"]
    # The first word of the sentence cannot be predicted; the rest is certain.
    assert min(known["token_logprobs"][1:]) > -0.1
    assert odd["sum_logprob"] < -20
    assert short["token_logprobs"] == [] and short["num_tokens"] == 1
    logits = np.load(logits_file, allow_pickle=False)
    assert logits.dtype == np.float32
    assert logits.shape == (3, max(odd["num_tokens"], known["num_tokens"]) - 1, VOCAB)
    for row, record in zip(logits, (odd, known, short), strict=True):
        values = record["token_logprobs"]
        assert len(values) == record["num_tokens"] - 1
        assert record["sum_logprob"] == pytest.approx(sum(values))
        assert np.isnan(row[len(values) :]).all() and np.isfinite(row[: len(values)]).all()
        best = torch.tensor(row[: len(values)]).log_softmax(dim=-1).max(dim=-1).values
        assert (best >= torch.tensor(values) - 1e-5).all()


def test_score_does_not_depend_on_the_batch(run: Path, tmp_path: Path) -> None:
    records = [{"tokens": list(range(3, length))} for length in (9, 30, 12, 49, 31, 5)]
    source = write_lines(tmp_path / "in.jsonl", *records)
    scores = []
    for size in ("1", "64", "8192"):
        status, output = run_score(run, source, "--tokens-per-batch", size)
        assert status == 0
        scores.append([record["token_logprobs"] for record in read_lines(output)])
    for other in scores[1:]:
        for values, expected in zip(other, scores[0], strict=True):
            assert values == pytest.approx(expected, abs=1e-5, rel=0)


def test_bf16_scores_are_near_those_of_fp32(run: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"text": SENTENCE})
    sums = []
    for precision in ("--fp32", "--bf16"):
        status, output = run_score(run, source, precision)
        assert status == 0
        sums.append(read_lines(output)[0]["token_logprobs"])
    # bf16 keeps 8 bits: 0.4 % of logits of up to 10 units, over two layers.
    assert sums[0] != sums[1]
    assert sums[1] == pytest.approx(sums[0], abs=0.2)


def test_wrong_input_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"text": "one"}, {"tokens": [3, VOCAB]})
    assert run_score(run, source)[0] == 2
    message = f"DataError: {source}, line 2: 'tokens' has {VOCAB} at index 1"
    assert message in capsys.readouterr().err
    source.write_text("")
    assert run_score(run, source)[0] == 2
    assert f"ConfigError: {source} has no lines" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_logits_of_a_large_input_are_refused(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(score, "LOGITS_LIMIT_BYTES", 1000)
    source = write_lines(tmp_path / "in.jsonl", {"tokens": [1, 2, 3]})
    status, output = run_score(run, source, "--logits", str(tmp_path / "logits.npy"))
    assert status == 2
    assert (
        f"ConfigError: --logits would be 3,200 bytes (1 lines x 2 x {VOCAB} x 4); it must be at"
        " most 1,000; give fewer or shorter lines" in capsys.readouterr().err
    )
    assert not output.exists()


def test_tools_write_the_same_under_torchrun(run: Path, tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "in.jsonl", *({"tokens": list(range(3, length))} for length in (9, 20, 12))
    )
    status, output = run_score(run, source)
    assert status == 0
    alone = read_lines(output)
    files = ["--load", str(run), "--input", str(source), "--output", str(output)]
    layout = ["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"]
    layout += ["--expert-tensor-parallel-size", "1"]
    done = ranks(2, REPO / "tools" / "score.py", *files, *layout)
    assert done.returncode == 0, done.stderr[-4000:]
    for record, expected in zip(read_lines(output), alone, strict=True):
        assert record["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-5)
    prompts = ["--prompt", "one two", "--prompt", "four five six", "--greedy"]
    done = ranks(
        2,
        REPO / "tools" / "generate.py",
        *("--load", str(run), "--max-new-tokens", "30", *prompts),
        *("--pipeline-model-parallel-size", "2", "--stop", "five six seven eight"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "one two three four \n---\nfour five six seven eight nine ten\n\n"
