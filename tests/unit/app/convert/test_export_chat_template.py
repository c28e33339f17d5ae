"""Exports write conversations as the model was trained on them, in transformers' hands too."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer
from megatron.trainer.errors import CheckpointError, ConfigError
from moe_app.chat import jinja_template
from moe_app.chat.dialogue import Dialogue
from moe_app.chat.prompting import open_named, prompt_ids, turn_end
from moe_app.chat.samples import DialogueEncoder
from moe_app.convert import convert_checkpoint
from moe_app.convert.chat_template import with_chat_template
from moe_app.convert.files import ExportedFiles, hf_files
from moe_app.pretrain.config import PretrainConfig
from moe_ext.convert import FAMILIES
from tests.distributed.convert_models import CONFIGS
from tests.unit.app.chat.make_chat import CHATML, END, MARKED, ODD, RenderHere, as_messages
from tests.unit.trainer.data.make_tokenizers import (
    make_hf_tokenizer,
    make_sentencepiece,
    write_json,
)

ROWS = 330
KINDS = {"hf": "HFTokenizer", "spm": "SentencePieceTokenizer"}


@pytest.fixture(autouse=True)
def render_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the processes that render; tests of their own are in chat/test_jinja_template.py."""
    monkeypatch.setattr(jinja_template, "RenderProcess", RenderHere)


def make_run(directory: Path, kind: str, *, template: str | None, own: str | None = None) -> Path:
    """Write what a checkpoint has beside its weights."""
    directory.mkdir()
    settings: dict[str, Any] = {"eos_token": END}
    special = [END, "<|im_start|>", "<|im_end|>"]
    if kind == "hf":
        settings |= {"bos_token": END}
        make_hf_tokenizer(directory, special)
    elif kind == "spm":  # as LLaMA's and JetMoE's: a space and a BOS before each text
        settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
        make_sentencepiece(directory, control=special, add_dummy_prefix=True)
    if own is not None:
        settings["chat_template"] = own
    write_json(directory, tokenizer_config=settings)
    (directory / "config.yaml").write_text(f"template: {template}\n" if template else "lr: 1.0\n")
    return directory


def export(
    run: Path, kind: str, requested: str | None = None, *, with_tokenizer: bool = True
) -> ExportedFiles:
    cfg = PretrainConfig(
        model=FAMILIES["olmoe"].model_config({**CONFIGS["olmoe"], "vocab_size": ROWS}),
        data=DataConfig(tokenizer_type=KINDS[kind], tokenizer_model=str(run)),  # type: ignore[arg-type]
    )
    made = hf_files(
        FAMILIES["olmoe"], cfg, run, like=None, dtype="float32", with_tokenizer=with_tokenizer
    )
    return with_chat_template(made, requested, run)


def opened(exported: ExportedFiles, directory: Path) -> Any:
    directory.mkdir()
    for name, content in exported.files.items():
        (directory / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def encoder_of(name: str, run: Path, tokenizer: Tokenizer) -> DialogueEncoder:
    return DialogueEncoder(
        tokenizer=tokenizer,
        template=open_named(name, run, tokenizer),
        train_on="all",
        seq_length=1 << 20,
        overlong="error",
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["olmoe", "zephyr", "tokenizer"])
def test_transformers_gives_the_ids_that_the_run_was_trained_on(
    name: str, kind: str, tmp_path: Path
) -> None:
    # Another template, which an import brought, must not win.
    run = make_run(tmp_path / "run", kind, template=name, own=MARKED)
    exported = export(run, kind)
    theirs = opened(exported, tmp_path / "out")
    ours = load_tokenizer(KINDS[kind], str(run))
    encoder = encoder_of(name, run, ours)
    for turns in ODD.values():
        whole = theirs.apply_chat_template(as_messages(turns), return_dict=False)
        assert whole == encoder.encode_whole(Dialogue(turns=turns)).ids.tolist()
        begun = theirs.apply_chat_template(
            as_messages(turns), add_generation_prompt=True, return_dict=False
        )
        assert begun == prompt_ids(encoder.template, ours, turns)
        assert begun != whole
    assert exported.report["chat_template"] == name
    ends = json.loads(exported.files["generation_config.json"])["eos_token_id"]
    end = turn_end(encoder.template, ours)
    assert end == (ours.eod if name != "tokenizer" else ours.token_id("<|im_end|>"))
    assert ends == (ours.eod if end == ours.eod else [ours.eod, end])


@pytest.mark.parametrize(
    ("template", "requested", "expected"),
    [
        (None, None, CHATML),
        (None, "olmoe", "<|assistant|>"),
        ("olmoe", "none", None),
        ("olmoe", "tokenizer", CHATML),
        ("tokenizer", "zephyr", "'<|' + message['role']"),
    ],
)
def test_flag_overrides_the_run_and_others_keep_what_they_have(
    template: str | None, requested: str | None, expected: str | None, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", "hf", template=template, own=CHATML)
    theirs = opened(export(run, "hf", requested), tmp_path / "out")
    if expected is None:
        assert theirs.chat_template is None
    else:
        assert expected in theirs.chat_template


@pytest.mark.parametrize(
    ("config", "requested", "with_tokenizer", "message"),
    [
        ("template: olmoe\n", "olmoe", False, "needs a tokenizer, and the export has none"),
        ("lr: 1.0\n", "tokenizer", True, "needs a template beside the tokenizer of"),
        ("template: [1]\n", None, True, r"has the template \[1\]; it must be one of olmoe, zephyr"),
        ("a: !!python/name:os.system\n", None, True, "is no config"),
    ],
)
def test_template_that_cannot_be_given_is_refused(
    config: str, requested: str | None, with_tokenizer: bool, message: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", "hf", template=None)
    (run / "config.yaml").write_text(config)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        export(run, "hf", requested, with_tokenizer=with_tokenizer)


def test_export_without_a_tokenizer_needs_no_template(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "hf", template="olmoe")
    names = {"config.json", "generation_config.json"}
    assert export(run, "hf", with_tokenizer=False).files.keys() == names
    with pytest.raises(SystemExit) as end:
        flags = ["--load", "a", "--hf", "b", "--no-tokenizer", "--chat-template", "olmoe"]
        convert_checkpoint.main(["export", *flags])
    assert end.value.code == 2
