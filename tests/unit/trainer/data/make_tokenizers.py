"""Make small tokenizers of several habits, with the files beside them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SENTENCES = ["the quick brown fox jumps over the lazy dog"] * 20


def make_hf_tokenizer(
    directory: Path,
    special: Sequence[str],
    *,
    plain: Sequence[str] = (),
    bos: str | None = None,
    **files: Any,
) -> str:
    """Write a byte-level BPE as tokenizer.json, and JSON files beside it; return its path.

    Args:
        directory: gets the files.
        special: added tokens that are marked special.
        plain: added tokens that are not.
        bos: special token that the post-processor puts first.
        files: contents, by name without `.json`.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES, trainer)
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    if bos is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    write_json(directory, **files)
    return str(directory / "tokenizer.json")


def make_sentencepiece(
    directory: Path, *, control: Sequence[str] = (), defined: Sequence[str] = (), **settings: Any
) -> str:
    """Write a SentencePiece BPE with byte fallback as tokenizer.model; return its path.

    Args:
        directory: gets the file.
        control: control symbols.
        defined: user-defined symbols.
        settings: of the trainer.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        **{
            "model_type": "bpe",
            "vocab_size": 310,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "control_symbols": list(control),
            "user_defined_symbols": list(defined),
            "minloglevel": 2,
            **settings,
        },
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return str(directory / "tokenizer.model")


def write_json(directory: Path, **files: Any) -> None:
    """Write JSON files, by name without `.json`."""
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
