"""A model that knows one sentence by heart, trained on two ranks, says it in one process."""

import argparse
import json
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path

import generate
import pytest
import torch
import train_tokenizer
from launcher import REPO, flags, torchrun

from megatron.trainer.checkpoint import FoundCheckpoint, find_checkpoint
from megatron.trainer.config import DataConfig
from megatron.trainer.data.tokenizer import load_tokenizer
from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.errors import ConfigError, DataError

# Of torch while it reads a checkpoint, and of megatron-core about its own embedding and loss.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]

VOCAB = 400
SENTENCE = "one two three four five six seven eight nine ten\n"
LAYOUT = {
    "tensor-model-parallel-size": 2,
    "expert-model-parallel-size": 2,
    "expert-tensor-parallel-size": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; its tokenizer is only in the checkpoint."""
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
    done = torchrun(
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
    """Give pytest its log handlers back, which the tools replace."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # torch.device("meta") looks its factories up once: before they are redirected to the CPU.
    torch.utils._device._device_constructors()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def texts(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> tuple[str, str]:
    """Standard output and error of the tool."""
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
    assert capsys.readouterr().err == f"{message}\n"


def test_missing_checkpoint_and_iteration_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--load", str(tmp_path), "--prompt", "one"]) == 2
    assert f"CheckpointError: no checkpoint in {tmp_path}" in capsys.readouterr().err
    assert generate.main(["--load", str(run), "--ckpt-step", "7", "--prompt", "one"]) == 2
    assert "has no checkpoint of iteration 7; it has 50" in capsys.readouterr().err


def test_more_than_one_process_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert generate.main(["--load", str(run), "--prompt", "one"]) == 2
    assert "torchrun started 2 processes; text is generated in one" in capsys.readouterr().err


def arguments_of(**settings: str | None) -> argparse.Namespace:
    return argparse.Namespace(**{"tokenizer_type": None, "tokenizer_model": None, **settings})


def test_run_without_a_tokenizer_needs_one_named(tmp_path: Path) -> None:
    found = FoundCheckpoint(path=tmp_path / "iter_0000001", iteration=1)
    message = (
        f"{found.path} brings no tokenizer, because its run had no --tokenizer-model; text needs"
        " one; name the tokenizer that made the training data with --tokenizer-model"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        generate.find_tokenizer(DataConfig(), found, arguments_of())


def test_tokenizer_of_the_checkpoint_yields_to_a_named_one(run: Path, tmp_path: Path) -> None:
    found = find_checkpoint(run)
    data = DataConfig(tokenizer_model="/nowhere/tokenizer.model")
    assert generate.find_tokenizer(data, found, arguments_of()).vocab_size == VOCAB
    missing = str(tmp_path / "other.model")
    with pytest.raises(DataError, match=re.escape(f"tokenizer {missing} does not exist")):
        generate.find_tokenizer(data, found, arguments_of(tokenizer_model=missing))
