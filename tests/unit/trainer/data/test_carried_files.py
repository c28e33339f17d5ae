"""Check what checkpoints keep of a run's tokenizer and of the checkpoint that it began from."""

import json
import logging
from pathlib import Path

import pytest

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.carried_files import collect_files
from megatron.trainer.data.tokenizer import load_tokenizer
from megatron.trainer.data.tokenizer_files import CARRIED_FILES
from megatron.trainer.errors import ConfigError, DataError
from tests.unit.trainer.data.make_tokenizers import (
    make_hf_tokenizer,
    make_sentencepiece,
    write_json,
)

CHAT = ["<|endoftext|>", "<|padding|>", "<|im_end|>"]


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """A checkpoint with everything that an import brings."""
    path = tmp_path / "imported"
    make_hf_tokenizer(
        path,
        CHAT,
        tokenizer_config={"eos_token": "<|im_end|>", "pad_token": "<|padding|>"},
        special_tokens_map={"eos_token": "<|im_end|>"},
        added_tokens={"<|im_end|>": 2},
        generation_config={"eos_token_id": [2, 0]},
        hf_config={"eos_token_id": 2, "pad_token_id": 1, "max_position_embeddings": 4096},
    )
    make_sentencepiece(path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "run.json").write_text("{}")
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in CARRIED_FILES}


@pytest.mark.parametrize("is_mock", [False, True])
def test_run_that_names_no_tokenizer_keeps_all_that_was_imported(
    is_mock: bool, imported: Path
) -> None:
    data = DataConfig(mock_data=is_mock, tokenizer_model="gone.json" if is_mock else None)
    carried = collect_files(data, imported)
    assert carried.files == contents(imported)
    assert carried.data == data


@pytest.mark.parametrize("named", ["copy/tokenizer.json", "copy", "imported/tokenizer.json"])
def test_run_that_names_the_same_tokenizer_keeps_all_that_was_imported(
    named: str, imported: Path, tmp_path: Path
) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "tokenizer.json").write_bytes((imported / "tokenizer.json").read_bytes())
    data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / named))
    carried = collect_files(data, imported)
    assert carried.files == contents(imported)
    # What reads the checkpoint finds the file by type and name.
    assert carried.data.tokenizer_type == "HFTokenizer"
    assert Path(carried.data.tokenizer_model or "").name == "tokenizer.json"


def test_another_tokenizer_is_not_mixed_with_the_imported_one(
    imported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_hf_tokenizer(tmp_path, ["</s>"], special_tokens_map={"eos_token": "</s>"})
    data = DataConfig(tokenizer_type="HFTokenizer", tokenizer_model=other)
    carried = collect_files(data, imported)
    assert carried.files.keys() == {"tokenizer.json", "special_tokens_map.json", "hf_config.json"}
    assert carried.files["tokenizer.json"] == Path(other).read_bytes()
    assert json.loads(carried.files["special_tokens_map.json"]) == {"eos_token": "</s>"}
    assert json.loads(carried.files["hf_config.json"]) == {"max_position_embeddings": 4096}
    (told,) = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert told == (
        f"{other} is another tokenizer than that of {imported}: the checkpoints of this run keep"
        " the new one, and leave out tokenizer.json, tokenizer.model, tokenizer_config.json,"
        " special_tokens_map.json, added_tokens.json, generation_config.json, chat_template.jinja"
        " and the token ids of hf_config.json"
    )


def test_tokenizer_under_a_name_of_its_own_is_compared_too(tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    path = Path(make_hf_tokenizer(loaded, ["</s>"], tokenizer_config={"eos_token": "</s>"}))
    path.rename(loaded / "mine.json")
    saved = {"tokenizer_type": "HFTokenizer", "tokenizer_model": "/elsewhere/mine.json"}
    same = DataConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(loaded / "mine.json"))
    assert collect_files(same, loaded, saved).files.keys() == {"mine.json", "tokenizer_config.json"}
    nothing = collect_files(DataConfig(), loaded, saved)
    assert nothing.files.keys() == {"tokenizer.json", "tokenizer_config.json"}
    other = make_hf_tokenizer(tmp_path / "other", ["<pad>", "</s>"])
    data = DataConfig(tokenizer_type="HFTokenizer", tokenizer_model=other)
    assert collect_files(data, loaded, saved).files.keys() == {"tokenizer.json"}


def test_end_that_only_the_models_config_names_is_stated(tmp_path: Path) -> None:
    specials = ["<unk>", "<s>", "</s>"]
    path = make_hf_tokenizer(tmp_path / "hf", specials, config={"eos_token_id": 2})
    data = DataConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(tmp_path / "hf"))
    carried = collect_files(data)
    assert carried.files.keys() == {"tokenizer.json"}
    assert carried.data.eod_token == "</s>"
    assert carried.data.tokenizer_model == path
    write_json(tmp_path / "hf", tokenizer_config={"eos_token": "</s>"})
    assert collect_files(data).data.eod_token is None


def test_end_that_is_no_token_is_refused_before_training(tmp_path: Path) -> None:
    path = make_hf_tokenizer(tmp_path, ["</s>"])
    data = DataConfig(tokenizer_type="HFTokenizer", tokenizer_model=path, eod_token="</S>")
    with pytest.raises(DataError, match=r"^--eod-token '</S>' is no token of"):
        collect_files(data)


def test_end_without_a_tokenizer_is_refused(imported: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^--eod-token '</s>' is a token of no tokenizer, because"
    ):
        collect_files(DataConfig(eod_token="</s>"))
    kept = collect_files(DataConfig(), imported, {"eod_token": "<|padding|>"})
    assert kept.data.eod_token == "<|padding|>"


def test_link_out_of_the_loaded_checkpoint_is_refused(imported: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (imported / "chat_template.jinja").unlink()
    (imported / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="outside of its directory; put the file itself there"):
        collect_files(DataConfig(), imported)


def test_kept_files_alone_give_the_same_tokenizer(imported: Path, tmp_path: Path) -> None:
    truth = load_tokenizer("HFTokenizer", str(imported))
    for name, content in collect_files(DataConfig(), imported).files.items():
        (tmp_path / name).write_bytes(content)
    kept = load_tokenizer("HFTokenizer", str(tmp_path))
    assert (kept.eod, kept.prefix) == (truth.eod, truth.prefix)
    assert kept.encode("the <|im_end|> fox") == truth.encode("the <|im_end|> fox")
