"""Check that no text becomes a control token, and that a BOS comes first where it should."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers.models import BPE, Unigram, WordLevel

from megatron.trainer.data.sentencepiece_pieces import read_pieces
from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer
from megatron.trainer.errors import DataError
from tests.unit.trainer.data.make_tokenizers import (
    make_hf_tokenizer,
    make_sentencepiece,
    write_json,
)

CONTROL = ["<|endoftext|>", "<|im_end|>", "[SEP]", "<pad>"]
"""Added tokens that are not marked special; a file names the last two."""
VOCABULARY = ["  ", "        ", "|||EMAIL_ADDRESS|||", "<think>"]
PIECES = ["the fox", " ", "\n", "é🙂", "<|padding|>", "<s>", *CONTROL, *VOCABULARY]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    settings = {"sep_token": "[SEP]", "eos_token": "<|endoftext|>"}
    names: dict[str, Any] = {
        "tokenizer_config": settings,
        "generation_config": {"pad_token_id": 292},
    }
    hf = make_hf_tokenizer(folder, ["<|padding|>"], plain=[*CONTROL, *VOCABULARY], **names)
    sp = make_sentencepiece(
        folder / "sp", control=["<|padding|>"], defined=[*CONTROL, *VOCABULARY], vocab_size=320
    )
    write_json(folder / "sp", tokenizer_config={**settings, "pad_token": "<pad>"})
    return {
        "HF": load_tokenizer("HFTokenizer", hf),
        "SP": load_tokenizer("SentencePieceTokenizer", sp),
    }


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("kind", ["HF", "SP"])
def test_text_that_spells_tokens_survives_and_becomes_no_control_token(
    kind: str, pieces: list[str], tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer, text = tokenizers[kind], "".join(pieces)
    control = {tokenizer.token_id(each) for each in [*CONTROL, "<|padding|>"]}
    assert None not in control
    ids = tokenizer.encode(text)
    assert control.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["HF", "SP"])
def test_added_tokens_that_are_vocabulary_stay_in_use(
    kind: str, tokenizers: dict[str, Tokenizer]
) -> None:
    # SentencePiece has turned spaces into U+2581 before it looks for its pieces.
    for text in VOCABULARY if kind == "HF" else VOCABULARY[2:]:
        assert (
            tokenizers[kind].encode(f"fox{text}fox").count(tokenizers[kind].token_id(text) or -1)
        ), text


def test_other_texts_are_encoded_as_the_libraries_do(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    hf = TokenizersTokenizer.from_file(make_hf_tokenizer(tmp_path, ["<s>"], plain=VOCABULARY))
    ours = load_tokenizer("HFTokenizer", str(tmp_path), eod_token="<s>")
    sp = SentencePieceProcessor()
    data = Path(make_sentencepiece(tmp_path, defined=["<|im_end|>", *VOCABULARY])).read_bytes()
    sp.LoadFromSerializedProto(data)
    ours_sp = load_tokenizer("SentencePieceTokenizer", str(tmp_path))
    for text in ("the  fox \n", "        x", "a|||EMAIL_ADDRESS|||b<think>", "naïve 日本 🙂", ""):
        assert ours.encode(text) == hf.encode(text).ids
        assert ours_sp.encode(text) == sp.EncodeAsIds(text)
    assert [piece.text for piece in read_pieces(data)] == [
        sp.IdToPiece(each) for each in range(sp.GetPieceSize())
    ]
    assert [piece.score for piece in read_pieces(data)] == [
        sp.GetScore(each) for each in range(sp.GetPieceSize())
    ]


@pytest.mark.parametrize(
    "model",
    [
        WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"),
        Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], 0, False),
    ],
)
def test_text_that_the_model_itself_reads_as_a_control_token_is_refused(
    model: WordLevel | Unigram, tmp_path: Path
) -> None:
    made = TokenizersTokenizer(model)
    made.add_special_tokens([AddedToken("</s>"), AddedToken("<unk>")])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer("HFTokenizer", str(tmp_path), eod_token="</s>")
    assert tokenizer.encode("a") == [2]
    assert tokenizer.encode("?") == [0]  # an unknown word is the model's own affair
    with pytest.raises(DataError, match=r"^a text spells '</s>', which .* as the token 1; only"):
        tokenizer.encode("</s>")


def test_special_tokens_of_byte_fallback_stay_in_use(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "</s>": 1, "<0x61>": 2, "b": 3}
    made = TokenizersTokenizer(BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    made.add_special_tokens([AddedToken(text) for text in ("</s>", "<0x61>")])
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer("HFTokenizer", str(tmp_path), eod_token="</s>").encode("ab") == [2, 3]


BOS: list[tuple[str | None, dict[str, Any]]] = [
    ("<s>", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    (None, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    (None, {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}),
    ("<s>", {"tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": False}),
    ("<s>", {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}),
]


@pytest.mark.parametrize(("bos", "settings"), BOS)
def test_document_begins_as_transformers_begins_it(
    bos: str | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **settings}
    specials = ["<unk>", "<s>", "</s>"]
    make_hf_tokenizer(tmp_path, specials, bos=bos, tokenizer_config=config)
    truth = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer("HFTokenizer", str(tmp_path))
    for text in ("the quick fox", "  x\n"):
        ids = tokenizer.encode_document(text)
        assert ids == truth(text)["input_ids"]
        assert tokenizer.encode(text) == truth(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_document("") == []


def test_add_bos_token_is_honoured_or_refused(tmp_path: Path) -> None:
    """Check what a post-processor or a SentencePiece model does not say itself."""
    hf = make_hf_tokenizer(tmp_path, ["<s>", "</s>"])
    sp = make_sentencepiece(tmp_path)
    for config, prefix in (
        ({"add_bos_token": True, "bos_token": "<s>"}, "<s>"),
        ({"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}, None),
        ({}, None),
    ):
        write_json(tmp_path, tokenizer_config={**config, "eos_token": "</s>"})
        for kind, path in (("HFTokenizer", hf), ("SentencePieceTokenizer", sp)):
            tokenizer = load_tokenizer(kind, path)
            expected = [] if prefix is None else [tokenizer.token_id(prefix)]
            assert list(tokenizer.prefix) == expected
            ids = tokenizer.encode_document("the fox")
            assert ids == [*expected, *tokenizer.encode("the fox")]
            assert tokenizer.decode(ids) == "the fox"
    write_json(
        tmp_path, tokenizer_config={"eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    )
    assert load_tokenizer("SentencePieceTokenizer", sp).prefix == (1,)
    write_json(tmp_path, tokenizer_config={"add_bos_token": True, "eos_token": "</s>"})
    with pytest.raises(DataError, match=r"puts a BOS before each text, but names none; set add_bo"):
        load_tokenizer("HFTokenizer", hf)
