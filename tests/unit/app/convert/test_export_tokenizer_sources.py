"""Wherever an export takes its tokenizer from, and whatever lies beside it, ids are the run's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers import processors
from tokenizers.models import WordLevel
from transformers import AutoTokenizer

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.errors import CheckpointError
from moe_app.convert import convert_checkpoint
from moe_app.convert.files import ExportedFiles, hf_files
from moe_app.convert.tokenizer_check import compare_with_transformers
from moe_app.pretrain.config import PretrainConfig
from moe_ext.convert import FAMILIES
from tests.distributed.convert_models import CONFIGS, make_hf
from tests.unit.trainer.data.make_tokenizers import (
    make_hf_tokenizer,
    make_sentencepiece,
    write_json,
)

END = "<|endoftext|>"
ROWS = 330
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}


def export(run: Path, *, like: Path | None = None, **data: Any) -> ExportedFiles:
    model = FAMILIES["olmoe"].model_config({**CONFIGS["olmoe"], "vocab_size": ROWS})
    cfg = PretrainConfig(model=model, data=DataConfig(**data))
    return hf_files(FAMILIES["olmoe"], cfg, run, like=like, dtype="float32")


def write(exported: ExportedFiles, directory: Path) -> Path:
    directory.mkdir()
    for name, content in exported.files.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.mark.parametrize("source", ["import", "mock data", "like"])
def test_sentencepiece_model_that_the_run_does_not_name_is_rewritten_too(
    source: str, tmp_path: Path
) -> None:
    make_sentencepiece(tmp_path / "run", control=[END], bos_id=-1, eos_id=-1)
    config = {**CONFIGS["olmoe"], "eos_token_id": 1}
    name = "config" if source == "like" else "hf_config"
    write_json(tmp_path / "run", **{name: config})
    data: dict[str, Any] = {"tokenizer_model": "x.model", "mock_data": True}
    made = export(
        tmp_path / ("empty" if source == "like" else "run"),
        like=tmp_path / "run" if source == "like" else None,
        **(data if source == "mock data" else {}),
    )
    assert made.files.keys() == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert made.tokenizer is not None
    theirs = AutoTokenizer.from_pretrained(write(made, tmp_path / "out"))
    for text in ("a cat", " two  spaces", "日本\n\t"):
        assert theirs.encode(text) == made.tokenizer.encode(text)
    assert made.report["tokenizer"]["num_equal"] > 500


def test_model_file_that_the_trainer_cannot_use_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"of another kind")
    write_json(tmp_path, hf_config=CONFIGS["olmoe"])
    assert export(tmp_path).files.keys() == {"config.json"}
    assert "the export has no tokenizer: the trainer cannot use it" in caplog.text


def test_tokens_that_the_model_has_not_are_not_named(tmp_path: Path) -> None:
    make_sentencepiece(tmp_path, control=[END], pad_id=3)
    named = {"pad_token": "[PAD]", "unk_token": "<unk>", "bos_token": {"content": "<s>"}}
    write_json(tmp_path, special_tokens_map=named, added_tokens={"[PAD]": 311})
    made = export(
        tmp_path, tokenizer_type="SentencePieceTokenizer", tokenizer_model="tokenizer.model"
    )
    theirs = AutoTokenizer.from_pretrained(write(made, tmp_path / "out"))
    assert (theirs.bos_token, theirs.pad_token, theirs.unk_token) == ("<s>", None, None)
    assert made.tokenizer is not None
    assert len(theirs) == made.tokenizer.vocab_size == 310
    assert theirs.encode("<unk>") == made.tokenizer.encode("<unk>")


def test_no_tokenizer_needs_none_whose_end_is_known(tmp_path: Path) -> None:
    make_hf_tokenizer(tmp_path, ["<x>"])
    data: dict[str, Any] = {"tokenizer_type": "HFTokenizer", "tokenizer_model": "tokenizer.json"}
    with pytest.raises(CheckpointError, match=r"nothing says which token .* --no-tokenizer"):
        export(tmp_path, **data)
    cfg = PretrainConfig(
        model=FAMILIES["olmoe"].model_config(CONFIGS["olmoe"]), data=DataConfig(**data)
    )
    made = hf_files(
        FAMILIES["olmoe"], cfg, tmp_path, like=None, dtype="float32", with_tokenizer=False
    )
    assert made.files.keys() == {"config.json"}


def test_ids_of_another_tokenizer_than_the_imports_are_said(tmp_path: Path) -> None:
    """Such a run leaves the import's ids out of hf_config.json."""
    make_hf_tokenizer(tmp_path, ["<x>", END])
    write_json(tmp_path, hf_config=CONFIGS["olmoe"])
    data: dict[str, Any] = {"tokenizer_type": "HFTokenizer", "tokenizer_model": "tokenizer.json"}
    assert "eos_token_id: not set -> 1" in export(tmp_path, **data).report["changes"]


def chat(directory: Path) -> None:
    """Turns end with another token than documents."""
    ends = {"eos_token_id": [0, 1]}
    settings = {**FAST, "eos_token": "<|im_end|>"}
    tokens = [END, "<|im_end|>"]
    make_hf_tokenizer(directory, tokens, tokenizer_config=settings, generation_config=ends)


def without_bos(directory: Path) -> None:
    """tokenizer_config.json overrides the BOS of tokenizer.json."""
    settings = {**FAST, "bos_token": "<s>", "add_bos_token": False}
    make_hf_tokenizer(directory, ["<s>", END], bos="<s>", tokenizer_config=settings)


def with_an_end(directory: Path) -> None:
    """tokenizer.json puts the end after a text; the trainer places it itself."""
    path = make_hf_tokenizer(directory, ["<x>", END], tokenizer_config=FAST)
    made = TokenizersTokenizer.from_file(path)
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, 1)]
    )
    made.save(path)


def with_a_word(directory: Path) -> None:
    """The model has the end as a word: the trainer refuses texts that spell it."""
    directory.mkdir()
    made = TokenizersTokenizer(WordLevel({END: 0, "a": 1}, unk_token="a"))
    made.add_special_tokens([END])
    made.save(str(directory / "tokenizer.json"))
    write_json(directory, tokenizer_config=FAST)


@pytest.mark.parametrize("make", [chat, without_bos, with_an_end, with_a_word])
def test_imported_tokenizers_that_are_right_are_exported(make: Any, tmp_path: Path) -> None:
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert", vocab_size=ROWS, eos_token_id=1)
    make(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", source, dirs_exist_ok=True)
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert convert_checkpoint.main(["import", "--hf", str(source), "--save", run]) == 0
    assert convert_checkpoint.main(["export", "--load", run, "--hf", str(out)]) == 0
    for file in (tmp_path / "tokenizer").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    if make is chat:
        cfg = PretrainConfig(
            model=FAMILIES["olmoe"].model_config({**CONFIGS["olmoe"], "vocab_size": ROWS}),
            data=DataConfig(tokenizer_type="HFTokenizer", tokenizer_model="tokenizer.json"),
        )
        made = hf_files(FAMILIES["olmoe"], cfg, out, like=None, dtype="float32")
        assert made.tokenizer is not None
        assert made.tokenizer.eod == 0  # not the eos_token, and both are right
        assert compare_with_transformers(made.tokenizer, out, ROWS)["passed"]


def test_verify_fails_where_transformers_makes_another_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The import names a padding that its tokenizer.json has not: it gets an id of its own."""
    path = make_hf_tokenizer(tmp_path / "made", ["<x>", END])
    rows = TokenizersTokenizer.from_file(path).get_vocab_size()
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert", vocab_size=rows, eos_token_id=1)
    shutil.copy(path, source)
    write_json(source, tokenizer_config={**FAST, "pad_token": "[PAD]"})
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert convert_checkpoint.main(["import", "--hf", str(source), "--save", run]) == 0
    assert convert_checkpoint.main(["export", "--load", run, "--hf", str(out), "--verify"]) == 1
    verification = json.loads((out / "conversion_report.json").read_text())["verification"]
    assert not verification["passed"]
    problem = f"it has the id {rows}, but the embedding has {rows} rows"
    assert verification["tokenizer"]["problem"] == problem
    assert problem in capsys.readouterr().err
