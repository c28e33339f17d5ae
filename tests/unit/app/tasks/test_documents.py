"""Hold perplexity and bits per byte of validation sets to those of each document alone."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.utils
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers

from megatron.trainer.data.token_bytes import count_token_bytes
from megatron.trainer.data.tokenizer import HFTokenizer, SentencePieceTokenizer
from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.errors import ConfigError
from megatron.trainer.state import TrainState
from moe_app.infer import score
from moe_app.pretrain import command
from moe_app.tasks.documents import DocumentRows, rolling_windows, score_documents
from tests.distributed.launcher import flags
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer, make_sentencepiece

END = "<|endoftext|>"
WORDS = "the quick brown fox jumps over the lazy dog é日本".split()
TEXTS = [
    " ".join(WORDS[(3 * number + k) % 10] for k in range(1 + 7 * number % 30))
    for number in range(40)
]
LENGTH = 16
SETTINGS: dict[str, Any] = {
    "num_layers": 1,
    "vocab_size": 320,
    "seq_length": LENGTH,
    "train_iters": 2,
    "eval_iters": 3,
    "global_batch_size": 4,
    "lr": 0.05,
    "split": "50,50",
    "tokenizer_type": "HFTokenizer",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, texts as tokens, and a run that scored five documents of each set."""
    where = tmp_path_factory.mktemp("documents")
    path = make_hf_tokenizer(where, [END], tokenizer_config={"eos_token": END})
    tokenizer = HFTokenizer(str(path))
    with TokenFileWriter(str(where / "web_text_document"), vocab_size=320) as writer:
        for text in TEXTS:
            writer.add_document([*tokenizer.encode_document(text), tokenizer.eod])
        writer.finish()
    assert command.main(given(where, save=where / "run", eval_documents=5)) == 0
    return where


def given(folder: Path, **more: Any) -> list[str]:
    data = folder / "web_text_document"
    return flags(
        **{**SETTINGS, **more},
        data_path=data,
        device="cpu",
        tokenizer_model=folder / "tokenizer.json",
    )


def held_back(folder: Path) -> list[str]:
    """Return the texts that the run does not train on."""
    tokenizer = HFTokenizer(str(folder / "tokenizer.json"))
    sizes = np.cumsum([len(tokenizer.encode(text)) + 1 for text in TEXTS])
    first = int(np.argmin(np.abs(sizes - sizes[-1] / 2))) + 1
    return TEXTS[first:]


def test_figures_are_those_of_scoring_each_document_alone(folder: Path, tmp_path: Path) -> None:
    tokenizer = HFTokenizer(str(folder / "tokenizer.json"))
    texts = held_back(folder)[:5]
    assert max(len(tokenizer.encode(text)) for text in texts) > LENGTH  # some take two windows
    windows = [
        (number, pair)
        for number, text in enumerate(texts)
        for pair in lm_eval.utils.get_rolling_token_windows(
            tokenizer.encode(text), tokenizer.eod, LENGTH, 1
        )
    ]
    source, scored = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"tokens": [*inputs, labels[-1]]} for _, (inputs, labels) in windows]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = ["--load", str(folder / "run"), "--device", "cpu"]
    assert score.main([*load, "--input", str(source), "--output", str(scored)]) == 0
    nats = [0.0] * len(texts)
    lines = scored.read_text().splitlines()
    for (number, (_, labels)), line in zip(windows, lines, strict=True):
        nats[number] -= sum(json.loads(line)["token_logprobs"][-len(labels) :])
    losses = [each / len(tokenizer.encode(text)) for each, text in zip(nats, texts, strict=True)]
    bits = [each / len(text.encode()) / math.log(2) for each, text in zip(nats, texts, strict=True)]
    found = last_evaluation(folder)["valid_documents"]["web"]
    assert found["documents"] == 5
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(np.mean(bits), rel=1e-5)


def last_evaluation(folder: Path) -> dict[str, Any]:
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def test_bits_of_windows_are_over_the_bytes_of_their_text(folder: Path) -> None:
    tokenizer = HFTokenizer(str(folder / "tokenizer.json"))
    ids = [
        each
        for text in held_back(folder)
        for each in (*tokenizer.encode_document(text), tokenizer.eod)
    ]
    labels = ids[1 : 1 + 3 * 4 * LENGTH]  # three global batches of four windows
    whole = tokenizer.decode(labels).replace(END, "")
    assert "\ufffd" not in whole
    record = last_evaluation(folder)
    loss, found = record["valid_loss"]["web"], record["valid_metrics"]["web"]
    assert found["perplexity"] == pytest.approx(math.exp(loss))
    expected = loss * len(labels) / len(whole.encode()) / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_windows_are_those_of_the_harness() -> None:
    for count in (1, 2, 7, 8, 9, 16, 17, 30):
        ids = [99, *range(count)]
        pairs = lm_eval.utils.get_rolling_token_windows(ids[1:], 99, 8, 1)
        assert [(list(each.ids), each.count) for each in rolling_windows(ids, max_length=8)] == [
            ([*inputs, labels[-1]], len(labels)) for inputs, labels in pairs
        ]


def test_documents_count_alike_whatever_their_length() -> None:
    documents = [
        DocumentRows(rows=slice(0, 1), num_tokens=1, num_bytes=2),
        DocumentRows(rows=slice(1, 3), num_tokens=8, num_bytes=4),
    ]
    found = score_documents(documents, [-3.0, -6.0, -2.0])
    assert found["loss"] == 2.0 and found["perplexity"] == pytest.approx(math.exp(2))
    assert found["bits_per_byte"] == pytest.approx((3 / 2 + 8 / 4) / 2 / math.log(2))


def test_bytes_of_tokens_are_those_of_their_text(folder: Path, tmp_path: Path) -> None:
    text = "a  naïve fox, 日本 \U0001f98a\n\tdog"
    for tokenizer in (
        HFTokenizer(str(folder / "tokenizer.json")),
        SentencePieceTokenizer(make_sentencepiece(tmp_path, control=[END])),
    ):
        sizes = count_token_bytes(tokenizer, tokenizer.vocab_size + 5)
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
        assert sizes[tokenizer.eod] == 0 and not sizes[-5:].any()


@pytest.mark.parametrize("mark", ["\u2581", None])
def test_bytes_of_added_tokens_are_those_of_their_text(mark: str | None, tmp_path: Path) -> None:
    """Where spaces are marks before added tokens are found, a mark in one is a space."""
    words = ["a", "b", "x", " ", "\u2581"]
    made = Tokenizer(models.BPE({word: each for each, word in enumerate(words)}, []))
    if mark is not None:
        made.normalizer = normalizers.Replace(" ", mark)
    made.add_special_tokens([END])
    made.add_tokens([AddedToken("\u2581" * 3, normalized=True)])
    made.add_tokens([AddedToken("\u2581x", normalized=False)])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HFTokenizer(str(tmp_path / "tokenizer.json"), eod_token=END)
    sizes = count_token_bytes(tokenizer, tokenizer.vocab_size)
    text = ("a   b" if mark else "a\u2581\u2581\u2581b") + "\u2581xa"
    ids = tokenizer.encode(text)
    assert ids == [0, 6, 1, 7, 0]
    assert sizes[ids].sum() == len(text.encode())
    assert sizes[tokenizer.eod] == 0


def test_documents_need_token_files_and_a_tokenizer(
    folder: Path, make_state: Callable[..., TrainState]
) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != "tokenizer_type"}
    with pytest.raises(ConfigError, match="--eval-documents needs a tokenizer"):
        make_state(**settings, eval_documents=2)
    model = folder / "tokenizer.json"
    with pytest.raises(ConfigError, match="validation set 'mock' has none; drop the flag"):
        make_state(**SETTINGS, tokenizer_model=model, eval_documents=2)
    with pytest.raises(ConfigError, match=r"eval_documents \(-1\) must be at least 0"):
        make_state(**SETTINGS, tokenizer_model=model, eval_documents=-1)
