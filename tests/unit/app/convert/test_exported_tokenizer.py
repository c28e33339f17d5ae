"""What transformers makes of an exported tokenizer is the run's own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.tokenizer import load_tokenizer
from megatron.trainer.errors import CheckpointError
from megatron.trainer.hf_files.directory import HFDirectory
from moe_app.convert.export_files import ExportedFiles, hf_files
from moe_app.convert.tokenizer_check import check_tokenizer, probe_texts
from moe_app.pretrain.config import PretrainConfig
from moe_ext.convert import FAMILIES
from tests.distributed.convert_models import make_hf
from tests.unit.trainer.data.make_tokenizers import (
    make_hf_tokenizer,
    make_sentencepiece,
    write_json,
)

Export = Callable[..., ExportedFiles]


@pytest.fixture(params=["olmoe", "jetmoe"])
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Export:
    """Export the files of a run whose checkpoint is `tmp_path / "run"`."""
    family = FAMILIES[request.param]
    form = "per-expert" if request.param == "olmoe" else "fused"
    source, _ = make_hf(tmp_path / "source", request.param, form)  # type: ignore[arg-type]
    with HFDirectory(source) as opened:
        model = replace(family.model_config(opened.config), vocab_size=512)

    def make(kind: str, *, data: dict[str, Any] | None = None, **settings: Any) -> ExportedFiles:
        name = {"SentencePieceTokenizer": "tokenizer.model", "HFTokenizer": "tokenizer.json"}[kind]
        cfg = PretrainConfig(
            model=model,
            data=DataConfig(
                tokenizer_type=kind,  # type: ignore[arg-type]
                tokenizer_model=f"data/{name}",
                **(data or {}),
            ),
        )
        arguments: dict[str, Any] = {"like": None, "dtype": "float32", **settings}
        return hf_files(family, cfg, tmp_path / "run", **arguments)

    return make


def opened(files: ExportedFiles, directory: Path) -> Any:
    """Let transformers open what was exported."""
    directory.mkdir()
    for name, content in files.files.items():
        (directory / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(directory)


def test_sentencepiece_run_exports_a_tokenizer_that_gives_its_ids(
    export: Export, tmp_path: Path
) -> None:
    path = make_sentencepiece(tmp_path / "run", control=["<|endoftext|>"], bos_id=-1, eos_id=-1)
    ours = load_tokenizer("SentencePieceTokenizer", path)
    made = export("SentencePieceTokenizer")
    assert "tokenizer.model" not in made.files  # transformers would build another one of it
    theirs = opened(made, tmp_path / "out")
    texts = probe_texts(["<|endoftext|>"])
    assert len(texts) > 400
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text
    assert theirs.eos_token == "<|endoftext|>" and theirs.eos_token_id == ours.eod
    assert json.loads(made.files["config.json"])["eos_token_id"] == ours.eod
    assert (len(theirs), theirs.pad_token) == (ours.vocab_size, None)
    assert made.report["tokenizer"] == {"compared_texts": len(texts)}


def test_bos_prefix_and_named_tokens_are_exported(export: Export, tmp_path: Path) -> None:
    path = make_sentencepiece(
        tmp_path / "run", control=["<pad>"], bos_id=1, eos_id=2, add_dummy_prefix=True
    )
    write_json(
        tmp_path / "run",
        tokenizer_config={
            **{"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"},
            **{"pad_token": "<pad>", "chat_template": "{{ messages }}", "model_max_length": 99},
            **{"tokenizer_class": "LlamaTokenizer"},
        },
    )
    ours = load_tokenizer("SentencePieceTokenizer", path)
    theirs = opened(export("SentencePieceTokenizer"), tmp_path / "out")
    for text in ("a cat", " two  spaces", "日本", "x\n"):
        assert theirs(text)["input_ids"] == ours.encode_document(text)
        assert ours.encode_document(text)[0] == 1
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "</s>", "<pad>")
    assert (theirs.chat_template, theirs.model_max_length) == ("{{ messages }}", 99)


def test_hf_run_exports_its_own_json_and_the_end_it_was_told(
    export: Export, tmp_path: Path
) -> None:
    path = make_hf_tokenizer(tmp_path / "run", ["<unk>", "</s>"])
    ours = load_tokenizer("HFTokenizer", path, eod_token="</s>")
    made = export("HFTokenizer", data={"eod_token": "</s>"})
    assert made.files["tokenizer.json"] == Path(path).read_bytes()
    theirs = opened(made, tmp_path / "out")
    assert theirs.eos_token_id == ours.eod
    for text in probe_texts(["</s>"]):
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text), text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 288}, "it is not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"it normalises text \(nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, r"it normalises text"),
        ({"defined": ["cat"]}, r"user-defined or unused \('cat', 1 in all\)"),
        ({"treat_whitespace_as_suffix": True}, "does not write a space as U.2581 before a word"),
    ],
)
def test_what_transformers_cannot_be_given_is_refused_or_left_out(
    settings: dict[str, Any],
    reason: str,
    export: Export,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_sentencepiece(tmp_path / "run", control=["<|endoftext|>"], **settings)
    with pytest.raises(CheckpointError, match=f"{reason}.*export with --no-tokenizer"):
        export("SentencePieceTokenizer")
    with caplog.at_level("WARNING", logger="convert"):
        made = export("SentencePieceTokenizer", has_tokenizer=False)
    assert set(made.files) == {"config.json"}
    assert "exported without a tokenizer: as asked for" in caplog.text
    own = load_tokenizer("SentencePieceTokenizer", str(tmp_path / "run" / "tokenizer.model"))
    assert json.loads(made.files["config.json"])["eos_token_id"] == own.eod


def test_another_tokenizer_is_noticed_by_ids_text_and_beginning(tmp_path: Path) -> None:
    own = make_sentencepiece(tmp_path / "own", control=["<|endoftext|>"], bos_id=-1, eos_id=-1)
    ours = load_tokenizer("SentencePieceTokenizer", own)
    other = make_hf_tokenizer(tmp_path / "other", ["<|endoftext|>"])
    with pytest.raises(CheckpointError, match=r"differs from the run's on \d+ of \d+ texts, first"):
        check_tokenizer(Path(other).read_bytes(), ours, where="export")
    theirs = load_tokenizer("HFTokenizer", other)
    right = json.loads(Path(other).read_text())
    assert check_tokenizer(json.dumps(right).encode(), theirs, where="export")["compared_texts"]
    begins = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    for changed in ({**right, "post_processor": begins}, {**right, "decoder": {"type": "Fuse"}}):
        with pytest.raises(CheckpointError, match="the tokenizer differs"):
            check_tokenizer(json.dumps(changed).encode(), theirs, where="export")


def test_export_of_a_continued_import_says_what_it_changes(
    export: Export, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_hf_tokenizer(tmp_path / "run", ["<unk>", "</s>"])
    settings = {"eos_token": "</s>", "pad_token": "<unk>"}
    generation = {"eos_token_id": [1, 5], "pad_token_id": 0}
    known = {"eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 8}
    write_json(
        tmp_path / "run",
        hf_config=known,
        tokenizer_config=settings,
        generation_config=generation,
    )
    (tmp_path / "run" / "chat_template.jinja").write_text("{{ messages }}")
    with caplog.at_level("WARNING", logger="convert"):
        made = export("HFTokenizer")
    config = json.loads(made.files["config.json"])
    assert (config["eos_token_id"], config["pad_token_id"]) == (1, 0)
    assert json.loads(made.files["tokenizer_config.json"]) == settings
    assert json.loads(made.files["generation_config.json"]) == generation
    assert made.files["chat_template.jinja"] == b"{{ messages }}"
    longer = config["max_position_embeddings"]
    assert longer > 8
    assert made.report["changed"] == {"max_position_embeddings": [8, longer]}
    assert f"the export changes max_position_embeddings: 8 -> {longer}" in caplog.text
