"""Pretraining holds its token files against what wrote them before it builds a model."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron.trainer.errors import DataError
from megatron.trainer.state import TrainState
from moe_app.data import preprocess_data

StateMaker = Callable[..., TrainState]
END = "<|endoftext|>"
WORDS = [f"w{n}" for n in range(40)]


def make_tokenizer(path: Path, pieces: list[str]) -> dict[str, str]:
    """A tokenizer whose ids are places in a list, and the flags that name it."""
    tokenizer = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(path))
    return {"tokenizer_type": "HFTokenizer", "tokenizer_model": str(path)}


@pytest.fixture
def data_path(tmp_path: Path) -> str:
    """Token files of 40 texts, written with tokenizer.json, and their manifest."""
    flags = make_tokenizer(tmp_path / "tokenizer.json", [*WORDS, END])
    texts = (" ".join(WORDS[(n + 3 * k) % 40] for k in range(9)) for n in range(40))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    named = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]
    output = ["--output-prefix", str(tmp_path / "web"), "--append-eod"]
    assert preprocess_data.main(["--input", str(corpus), *output, *named]) == 0
    return str(tmp_path / "web_text_document")


def test_run_with_the_tokenizer_of_its_data_starts_without_a_word(
    make_state: StateMaker, data_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    flags = make_tokenizer(tmp_path / "copy.json", [*WORDS, END])
    make_state(data_path=data_path, reset_attention_mask=True, **flags)
    assert not [line for line in caplog.messages if line.startswith("data: ")]
    assert (
        "attention: documents of a sequence are kept apart by variable-length attention, one call"
        " of causal attention a document (--packed-attention)" in caplog.messages
    )


def test_run_with_another_tokenizer_than_its_data_is_refused(
    make_state: StateMaker, data_path: str, tmp_path: Path
) -> None:
    """Of as many ids, all of which the model has an embedding for."""
    other = make_tokenizer(tmp_path / "other.json", [END, *WORDS])
    with pytest.raises(DataError, match=rf"^{data_path} was written with tokenizer\.json \("):
        make_state(data_path=data_path, **other)


def test_without_a_manifest_only_the_end_of_documents_can_show_another_tokenizer(
    make_state: StateMaker, data_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    Path(f"{data_path}.json").unlink()
    other = make_tokenizer(tmp_path / "other.json", [END, *WORDS])
    make_state(data_path=data_path, **other)
    assert (
        "data: which tokenizer wrote the token files is not known: there is no"
        f" {data_path}.json" in caplog.messages
    )
    with pytest.raises(
        DataError,
        match=r"^the tokenizer ends documents with id 0, which contradicts the index of source"
        r" 'web': of 40 documents looked at, of 40 in .*\.idx, 0 end with it and \d+ hold it",
    ):
        make_state(data_path=data_path, reset_attention_mask=True, **other)
