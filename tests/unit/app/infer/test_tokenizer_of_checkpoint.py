"""Check that runs that continue an import keep its tokenizer, and tools open it from them."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron.trainer.checkpoint import FoundCheckpoint, find_checkpoint, save_checkpoint
from megatron.trainer.checkpoint.saved_run import RUN_NAME, WEIGHTS_ONLY
from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.data.tokenizer_files import CARRIED_FILES, TOKENIZER_FILES
from megatron.trainer.records.run_dir import CONFIG_NAME
from megatron.trainer.resume import checkpoint_writer, resume, saved_config
from megatron.trainer.state import TrainState, model_state
from moe_app.infer import open_model
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer, make_sentencepiece

StateMaker = Callable[..., TrainState]


def opened(found: FoundCheckpoint, **flags: str | None) -> Tokenizer:
    args = {"tokenizer_type": None, "tokenizer_model": None, "eod_token": None, **flags}
    names = ("tokenizer_type", "tokenizer_model", "eod_token", "mock_data")
    saved = {name: value for name, value in saved_config(found).items() if name in names}
    return open_model.find_tokenizer(DataConfig(**saved), found, argparse.Namespace(**args))


def go_on(state: TrainState) -> FoundCheckpoint:
    """Begin as pretrain.py does, and save at once."""
    beginning = resume(state, state.cfg.model)  # type: ignore[attr-defined]
    write = checkpoint_writer(state, loaded=beginning.loaded)
    assert write is not None
    write(state)
    return find_checkpoint(Path(state.cfg.checkpoint.save or ""))


def test_runs_keep_what_their_import_brought(make_state: StateMaker, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    make_hf_tokenizer(
        hf,
        ["<unk>", "<s>", "</s>"],
        plain=["<|im_end|>"],
        bos="<s>",
        tokenizer_config={"bos_token": "<s>"},
        added_tokens={"<|im_end|>": 280},
        generation_config={"eos_token_id": [2, 280]},
        hf_config={"eos_token_id": 2, "max_position_embeddings": 4096},
    )
    make_sentencepiece(hf)
    for name in ("special_tokens_map.json", "chat_template.jinja"):
        (hf / name).write_text("{}")
    state = make_state()
    files = {CONFIG_NAME: dump_config(state.cfg), RUN_NAME: json.dumps({WEIGHTS_ONLY: True})}
    brought = {name: hf / name for name in CARRIED_FILES}
    save_checkpoint(
        tmp_path / "imported", 0, model_state(state.modules), files={**files, **brought}
    )

    first = go_on(make_state(load=tmp_path / "imported", save=tmp_path / "first"))
    shutil.rmtree(tmp_path / "imported")
    second = go_on(make_state(load=tmp_path / "first", save=tmp_path / "second", finetune=True))
    contents = {name: path.read_bytes() for name, path in brought.items()}
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(hf)
    assert {name: (second.path / name).read_bytes() for name in brought} == contents
    assert first.path.name == second.path.name

    tokenizer = opened(second)
    assert (tokenizer.eod, tokenizer.prefix) == (2, (1,))
    assert opened(second, eod_token="<|im_end|>").eod == tokenizer.token_id("<|im_end|>")
    kinds = {kind: opened(second, tokenizer_type=kind).vocab_size for kind in TOKENIZER_FILES}
    assert kinds == {"HFTokenizer": tokenizer.vocab_size, "SentencePieceTokenizer": 310}


def test_checkpoint_has_the_whole_tokenizer_of_a_directory(
    make_state: StateMaker, tmp_path: Path
) -> None:
    make_hf_tokenizer(
        tmp_path / "hf",
        ["<s>", "</s>"],
        bos="<s>",
        tokenizer_config={"eos_token": "</s>"},
        generation_config={"eos_token_id": 1},
    )
    flags = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tmp_path / "hf"}
    state = make_state(save=tmp_path / "run", data_path=tokens(tmp_path), **flags)
    found = go_on(state)
    shutil.rmtree(tmp_path / "hf")
    there = {path.name for path in found.path.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= there
    assert (opened(found).eod, opened(found).prefix) == (1, (0,))


def tokens(folder: Path) -> str:
    """Write a small token file; return its prefix."""
    from megatron.trainer.data.writer import TokenFileWriter

    with TokenFileWriter(str(folder / "tokens"), vocab_size=64) as writer:
        writer.add_document([number % 64 for number in range(2000)])
        writer.finish()
    return str(folder / "tokens")


def test_flag_names_the_end_of_another_tokenizer(tmp_path: Path) -> None:
    found = FoundCheckpoint(path=tmp_path / "iter_0000001", iteration=1)
    make_hf_tokenizer(tmp_path, ["<s>", "</s>"])
    args = argparse.Namespace(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path), eod_token="</s>"
    )
    # The end that the run's config states is one of the run's tokenizer.
    data = DataConfig(tokenizer_model="/nowhere/tokenizer.model", eod_token="<|endoftext|>")
    assert open_model.find_tokenizer(data, found, args).eod == 1
