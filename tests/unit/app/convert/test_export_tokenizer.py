"""An exported tokenizer gives the trainer's ids, or the export is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers import decoders
from transformers import AutoTokenizer

from megatron.trainer.config.schema import DataConfig, TrainingConfig
from megatron.trainer.data.tokenizer import load_tokenizer
from megatron.trainer.errors import CheckpointError
from moe_app.convert import convert_checkpoint
from moe_app.convert.exported_tokenizer import check_tokenizer
from moe_app.convert.files import ExportedFiles, hf_files
from moe_app.convert.sentencepiece_json import to_tokenizer_json
from moe_app.convert.tokenizer_samples import sample_texts
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
FILES = {"SentencePieceTokenizer": "tokenizer.model", "HFTokenizer": "tokenizer.json"}


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A BPE as tools/train_tokenizer.py makes it."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    path = make_sentencepiece(directory, control=[END], bos_id=-1, eos_id=-1)
    return Path(path).read_bytes()


def export(
    run: Path, kind: str, family: str = "olmoe", seq_length: int = 64, **options: Any
) -> ExportedFiles:
    """Return what an export of a run on data has beside the weights."""
    cfg = PretrainConfig(
        model=FAMILIES[family].model_config({**CONFIGS[family], "vocab_size": ROWS}),
        data=DataConfig(
            tokenizer_type=kind,  # type: ignore[arg-type]  # a name in FILES
            tokenizer_model=f"data/{FILES[kind]}",
        ),
        training=TrainingConfig(seq_length=seq_length),
    )
    return hf_files(FAMILIES[family], cfg, run, like=None, dtype="float32", **options)


def write_files(exported: ExportedFiles, directory: Path) -> None:
    directory.mkdir()
    for name, content in exported.files.items():
        (directory / name).write_bytes(content)


def open_with_transformers(exported: ExportedFiles, directory: Path) -> Any:
    write_files(exported, directory)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def assert_same_ids(theirs: Any, encode: Callable[[str], list[int]], control: list[str]) -> None:
    texts = sample_texts(control)
    # Spelled tokens are text for us, and for transformers if it is told so.
    found = [
        theirs.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts
    ]
    for text, ids in zip(texts, found, strict=True):
        assert ids == encode(text), text


@pytest.mark.parametrize("family", ["olmoe", "jetmoe"])
def test_autotokenizer_gives_the_ids_of_a_sentencepiece_model(
    family: str, sentencepiece_model: bytes, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    exported = export(tmp_path, "SentencePieceTokenizer", family)
    assert exported.files.keys() == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    theirs = open_with_transformers(exported, tmp_path / "out")
    own = SentencePieceProcessor()
    own.LoadFromSerializedProto(sentencepiece_model)
    assert_same_ids(theirs, own.EncodeAsIds, [END])
    for text in sample_texts([]):
        ids = own.EncodeAsIds(text)
        assert theirs.decode(ids) == own.DecodeIds(ids), text
    end = own.PieceToId(END)
    assert (theirs.eos_token, theirs.eos_token_id) == (END, end)
    assert theirs.encode(f"a{END}")[-1] == end
    assert theirs.pad_token is None
    assert max(theirs.get_vocab().values()) == own.GetPieceSize() - 1
    for name in ("config.json", "generation_config.json"):
        assert json.loads(exported.files[name])["eos_token_id"] == end


@pytest.mark.parametrize("family", ["olmoe", "jetmoe"])
def test_autotokenizer_gives_the_ids_of_a_tokenizer_json(family: str, tmp_path: Path) -> None:
    path = make_hf_tokenizer(tmp_path, [END])
    theirs = open_with_transformers(export(tmp_path, "HFTokenizer", family), tmp_path / "out")
    own = TokenizersTokenizer.from_file(path)
    own.encode_special_tokens = True
    assert_same_ids(theirs, lambda text: own.encode(text, add_special_tokens=False).ids, [END])
    assert theirs.eos_token == END
    assert theirs.decode(own.encode("a , b ' s").ids) == "a , b ' s"


def test_exported_sentencepiece_model_keeps_prefixes_padding_and_chat_template(
    tmp_path: Path,
) -> None:
    """As LLaMA's: a space and a BOS before each text."""
    path = make_sentencepiece(
        tmp_path, control=["<|x|>"], defined=["<|im_end|>"], add_dummy_prefix=True, pad_id=3
    )
    write_json(
        tmp_path,
        tokenizer_config={
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            "mask_token": "<not there>",
        },
    )
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>")
    exported = export(tmp_path, "SentencePieceTokenizer")
    theirs = open_with_transformers(exported, tmp_path / "out")
    ours = load_tokenizer("SentencePieceTokenizer", path)
    assert_same_ids(theirs, ours.encode, ours.control_texts())
    assert theirs.encode(" hello  world") == ours.encode_document(" hello  world")
    assert theirs.encode("x")[0] == ours.token_id("<s>")
    assert theirs.decode(ours.encode(" hello")) == " hello"
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "<|im_end|>", "<pad>")
    assert (theirs.unk_token, theirs.mask_token) == (None, None)
    assert max(theirs.get_vocab().values()) == ours.vocab_size - 1
    assert theirs.chat_template == "{{ messages[0]['content'] }}<|im_end|>"
    config = json.loads(exported.files["config.json"])
    ids = {role: config[f"{role}_token_id"] for role in ("bos", "eos", "pad")}
    assert ids == {"bos": 1, "eos": ours.token_id("<|im_end|>"), "pad": 3}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unigram": (
        {"model_type": "unigram", "vocab_size": 287},
        "it is a model of Unigram, not of BPE",
    ),
    "NFKC": ({"normalization_rule_name": "nfkc"}, "it normalises characters, as NFKC does"),
    "user-defined": ({"defined": ["=>"]}, "it has user-defined pieces ('=>')"),
    "no bytes": ({"byte_fallback": False, "vocab_size": 60}, "it has no byte fallback"),
    "spaces": ({"remove_extra_whitespaces": True}, "it removes repeated spaces"),
    "suffix": ({"treat_whitespace_as_suffix": True}, "it has spaces at the end of words"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tokenizer_without_an_equal_is_refused_or_left_out(name: str, tmp_path: Path) -> None:
    settings, reason = REFUSED[name]
    make_sentencepiece(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=re.escape(reason)) as caught:
        export(tmp_path, "SentencePieceTokenizer")
    assert "export without a tokenizer with --no-tokenizer" in str(caught.value)
    exported = export(tmp_path, "SentencePieceTokenizer", with_tokenizer=False)
    assert exported.files.keys() == {"config.json", "generation_config.json"}
    assert json.loads(exported.files["config.json"])["eos_token_id"] == 2
    assert exported.report == {
        "tokenizer": {"exported": False, "because": "--no-tokenizer was given"}
    }


def without_a_merge(content: bytes) -> bytes:
    found = json.loads(content)
    found["model"]["merges"].pop(0)
    return json.dumps(found).encode()


def with_another_decoder(content: bytes) -> bytes:
    found = TokenizersTokenizer.from_buffer(content)
    found.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return str(found.to_str()).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_merge, r"gives other ids or text for \d+ of \d{3} texts: '.* becomes \["),
        (with_another_decoder, r"the ids of '.*' are read as '.*' instead of '"),
    ],
)
def test_comparison_finds_other_ids_and_other_text(
    change: Callable[[bytes], bytes], message: str, sentencepiece_model: bytes, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    ours = load_tokenizer("SentencePieceTokenizer", str(tmp_path / "tokenizer.model"))
    good = to_tokenizer_json(sentencepiece_model)
    found = check_tokenizer({"tokenizer.json": good}, ours, ours.vocab_size)
    assert found.num_equal == found.num_texts == len(sample_texts([END]))
    with pytest.raises(CheckpointError, match=message):
        check_tokenizer({"tokenizer.json": change(good)}, ours, ours.vocab_size)
    with pytest.raises(CheckpointError, match="and the model's embedding 309"):
        check_tokenizer({"tokenizer.json": good}, ours, ours.vocab_size - 1)


def test_texts_to_compare_are_the_same_each_time_and_varied() -> None:
    texts = sample_texts([END])
    assert texts == sample_texts([END])
    assert len(set(texts)) == len(texts) > 500
    assert {"", END, " " * 8, "\n" * 3, "\t" * 2} <= set(texts)
    joined = "".join(texts)
    for sample in ("\u0301", "\u200d", "日本", "é", "\x00", "0x", "<0x0A>", "\U0001f469"):
        assert sample in joined
    assert max(map(len, texts)) > 2000


def test_tokens_that_transformers_always_parses_are_counted_apart(tmp_path: Path) -> None:
    make_hf_tokenizer(tmp_path, ["<|padding|>"], plain=[END])
    report = export(tmp_path, "HFTokenizer").report["tokenizer"]
    assert report["num_equal"] == report["num_texts"] > 500
    spelled = sum(END in text for text in sample_texts([END, "<|padding|>"]))
    assert report["num_texts_with_tokens_that_are_parsed"] == spelled > 3


def test_export_of_an_imported_model_says_what_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files: dict[str, Any] = {
        "tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"},
        "generation_config": {"eos_token_id": [0, 2]},
        "hf_config": {
            **CONFIGS["olmoe"], "eos_token_id": 2, "pad_token_id": 1, "torch_dtype": "bfloat16"
        },
    }  # fmt: skip
    make_hf_tokenizer(tmp_path, [END, "<|pad|>", "<|im_end|>"], **files)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    same = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    with caplog.at_level("INFO", logger="convert"):
        exported = export(tmp_path, "HFTokenizer", seq_length=96)
    for name in (*same, "chat_template.jinja"):
        assert exported.files[name] == (tmp_path / name).read_bytes()
    config = json.loads(exported.files["config.json"])
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (2, 1, None)
    expected = [
        "vocab_size: 120 -> 330",
        "max_position_embeddings: 64 -> 96",
        'torch_dtype: "bfloat16" -> "float32"',
    ]
    assert sorted(exported.report["changes"]) == sorted(expected)
    said = [each for each in caplog.messages if each.startswith("export changes ")]
    assert sorted(said) == sorted(f"export changes {each}" for each in expected)


def test_verify_compares_the_tokenizer_that_transformers_builds(
    sentencepiece_model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert", vocab_size=ROWS, eos_token_id=3)
    (source / "tokenizer.model").write_bytes(sentencepiece_model)
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert convert_checkpoint.main(["import", "--hf", str(source), "--save", run]) == 0
    exporting = ["export", "--load", run, "--verify", "--hf"]
    assert convert_checkpoint.main([*exporting, str(out)]) == 0
    report = json.loads((out / "conversion_report.json").read_text())
    count = len(sample_texts([END]))
    assert report["tokenizer"] == {"num_texts": count, "num_equal": count}
    verified = report["verification"]["tokenizer"]
    assert verified["passed"]
    assert (verified["num_texts"], verified["num_equal"]) == (count, count)
    assert report["changes"] == [
        "tokenizer.json: not there -> made",
        "tokenizer.model: there -> left out",
        "tokenizer_config.json: not there -> made",
    ]
    # What it made of a tokenizer.model: a tokenizer of another kind.
    json_directory = tmp_path / "json"
    make_hf_tokenizer(json_directory, [END])
    real = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained",
        lambda *_, **__: real(tmp_path / "other", local_files_only=True),
    )
    write_files(export(json_directory, "HFTokenizer"), tmp_path / "other")
    assert convert_checkpoint.main([*exporting, str(tmp_path / "again")]) == 1
    report = json.loads((tmp_path / "again" / "conversion_report.json").read_text())
    assert not report["verification"]["passed"]
    assert "becomes" in report["verification"]["tokenizer"]["problem"]


def test_no_tokenizer_is_exported_where_none_is_wanted(
    sentencepiece_model: bytes, tmp_path: Path
) -> None:
    source, _ = make_hf(tmp_path / "hf", "olmoe", "per-expert", vocab_size=ROWS)
    (source / "tokenizer.model").write_bytes(sentencepiece_model)
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert convert_checkpoint.main(["import", "--hf", str(source), "--save", run]) == 0
    exporting = ["export", "--load", run, "--hf", str(out), "--no-tokenizer"]
    assert convert_checkpoint.main(exporting) == 0
    assert sorted(each.name for each in out.iterdir()) == [
        "config.json",
        "conversion_report.json",
        "model.safetensors",
    ]
