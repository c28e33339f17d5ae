"""Check which token ends a document, by what the files beside a tokenizer say."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.data.tokenizer import load_tokenizer
from megatron.trainer.errors import DataError
from tests.unit.trainer.data.make_tokenizers import (
    make_hf_tokenizer,
    make_sentencepiece,
    write_json,
)

LLAMA = ["<unk>", "<s>", "</s>"]
CHAT = ["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"tokenizer_config": {"eos_token": "</s>"}}, id="text"),
        pytest.param({"tokenizer_config": {"eos_token": {"content": "</s>"}}}, id="object"),
        pytest.param({"special_tokens_map": {"eos_token": "</s>"}}, id="map"),
        pytest.param({"generation_config": {"eos_token_id": 2}}, id="id of generation"),
        pytest.param({"generation_config": {"eos_token_id": [2, 1]}}, id="ids of generation"),
        pytest.param({"config": {"eos_token_id": 2}}, id="id of the model"),
        pytest.param({"hf_config": {"eos_token_id": 2}}, id="id of an imported model"),
    ],
)
def test_end_is_what_a_file_beside_the_tokenizer_names(
    files: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_hf_tokenizer(tmp_path, LLAMA, **files)
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer("HFTokenizer", path)
    assert (tokenizer.eod, tokenizer.token_text(2)) == (2, "</s>")
    (name,) = files
    (line,) = [each.getMessage() for each in caplog.records]
    assert line.startswith("documents end with '</s>' (id 2): the eos_token")
    assert f"{tmp_path / name}.json" in line


@pytest.mark.parametrize(
    ("files", "end"),
    [
        pytest.param({}, "<|endoftext|>", id="nothing named"),
        pytest.param({"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|im_end|>", id="one"),
        pytest.param(
            {
                "tokenizer_config": {"eos_token": "<|im_end|>"},
                "generation_config": {"eos_token_id": [3, 0]},
            },
            "<|endoftext|>",
            id="turns end with the first, documents with the second",
        ),
        pytest.param(
            {
                "tokenizer_config": {"eos_token": "<|padding|>"},
                "special_tokens_map": {"eos_token": "<|im_start|>"},
                "config": {"eos_token_id": 3},
            },
            "<|padding|>",
            id="the tokenizer's settings come first",
        ),
        pytest.param({"config": {"eos_token_id": 50279}}, "<|endoftext|>", id="no such id"),
        pytest.param({"config": {"eos_token_id": 83}}, "<|endoftext|>", id="id of a letter"),
    ],
)
def test_order_of_the_sources(files: dict[str, Any], end: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("HFTokenizer", make_hf_tokenizer(tmp_path, CHAT, **files))
    assert tokenizer.token_text(tokenizer.eod) == end
    chosen = load_tokenizer("HFTokenizer", str(tmp_path), eod_token="<|im_start|>")
    assert chosen.eod == 2


def test_log_names_the_other_candidate(tmp_path: Path) -> None:
    make_hf_tokenizer(tmp_path, CHAT, tokenizer_config={"eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer("HFTokenizer", str(tmp_path))
    assert str(tokenizer.end) == (
        "documents end with '<|im_end|>' (id 3): the eos_token of"
        f" {tmp_path / 'tokenizer_config.json'}; it has '<|endoftext|>', too: --eod-token chooses"
    )


def test_missing_end_says_what_was_read_and_what_there_is(tmp_path: Path) -> None:
    path = make_hf_tokenizer(tmp_path, LLAMA, tokenizer_config={"model_max_length": 64})
    message = (
        f"nothing says which token of {path} ends a document: it has no '<|endoftext|>', and the"
        " files beside it (tokenizer_config.json) name no eos_token and no eos_token_id that is a"
        " token of it; name the token with --eod-token; the tokens that no text becomes are: <unk>"
        " <s> </s>"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        load_tokenizer("HFTokenizer", path)
    assert load_tokenizer("HFTokenizer", path, eod_token="</s>").eod == 2  # the remedy works


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("</S>", "--eod-token '</S>' is no token of {path}; documents must end with one; the "),
        ("q", "--eod-token 'q' (id 83) is what ordinary text becomes in {path}; only a token that"),
    ],
)
def test_end_that_is_no_token_or_text_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = make_hf_tokenizer(tmp_path, LLAMA)
    with pytest.raises(DataError, match="^" + re.escape(message.format(path=path))):
        load_tokenizer("HFTokenizer", path, eod_token=text)


def test_named_end_that_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    path = make_hf_tokenizer(tmp_path, LLAMA, tokenizer_config={"eos_token": "<|im_end|>"})
    message = (
        f"{tmp_path / 'tokenizer_config.json'} names the eos_token '<|im_end|>', which is no token"
        f" of {path}; documents must end with a token that no text becomes; name another with"
        " --eod-token, or restore the files; the tokens that no text becomes are: <unk> <s> </s>"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        load_tokenizer("HFTokenizer", path)
    assert load_tokenizer("HFTokenizer", path, eod_token="</s>").eod == 2


@pytest.mark.parametrize("content", ["{", "[1]"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_damaged_file_beside_the_tokenizer_is_named(
    name: str, content: str, tmp_path: Path
) -> None:
    path = make_hf_tokenizer(tmp_path, CHAT)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / name))} (is|holds a list,) "):
        load_tokenizer("HFTokenizer", path)


def test_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    path = make_hf_tokenizer(tmp_path / "a", CHAT)
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "a" / "tokenizer_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(DataError, match=r"is a link to .*secret\.json, outside of its directory"):
        load_tokenizer("HFTokenizer", path)


@pytest.mark.parametrize("kind", ["HFTokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_directory_is_taken_for_the_file_it_holds(kind: str, tmp_path: Path) -> None:
    path = make_hf_tokenizer(tmp_path, LLAMA, tokenizer_config={"eos_token": "</s>"})
    # The only file there decides, since --tokenizer-type has a default.
    whole = load_tokenizer(kind, str(tmp_path))
    assert whole.encode("the fox") == load_tokenizer("HFTokenizer", path).encode("the fox")
    make_sentencepiece(tmp_path)
    is_sentencepiece = kind == "SentencePieceTokenizer"
    assert load_tokenizer(kind, str(tmp_path)).vocab_size == (310 if is_sentencepiece else 291)


def test_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").touch()
    message = (
        f"{tmp_path} holds no tokenizer: neither tokenizer.json nor tokenizer.model; it holds"
        " vocab.json; name another directory or the file itself with --tokenizer-model"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        load_tokenizer("HFTokenizer", str(tmp_path))


def test_end_of_a_sentencepiece_model(tmp_path: Path) -> None:
    path = make_sentencepiece(tmp_path, control=["<|endoftext|>"], defined=["<|im_end|>", "<sep>"])

    def end(**given: str) -> str | None:
        tokenizer = load_tokenizer("SentencePieceTokenizer", path, **given)
        return tokenizer.token_text(tokenizer.eod)

    assert end() == "<|endoftext|>"
    assert end(eod_token="<|im_end|>") == "<|im_end|>"
    write_json(tmp_path, generation_config={"eos_token_id": 2})
    assert end() == "</s>"
    write_json(tmp_path, special_tokens_map={"eos_token": "<|im_end|>"})
    assert end() == "<|im_end|>"
    with pytest.raises(DataError, match=r"^--eod-token 'e' .* is what ordinary text becomes"):
        end(eod_token="e")
    alone = make_sentencepiece(tmp_path / "alone", eos_id=-1)
    with pytest.raises(DataError, match=r"^nothing says which token .* are: <s>$"):
        load_tokenizer("SentencePieceTokenizer", alone)
