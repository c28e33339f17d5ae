"""Compares an exported tokenizer with the run's own, on several hundred texts.

Text that spells a control token is ordinary text to the trainer. transformers takes it for the
token unless it is told `split_special_tokens=True`, so those texts are compared under that setting.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as TokenizersTokenizer

from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import CheckpointError
from megatron.trainer.hf_files.directory import CONFIG_NAME, read_json

_SEED = 20240924
_NUM_RANDOM = 400
_FIXED = (
    *("", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n \t ", "a", " a", "a ", "  a  b  "),
    *("hello world", "Hello, World!", "don't", "1234567890", "3.14e-10", "-0", "x" * 300),
    "def read(path):\n    with open(path) as file:\n\t\treturn file.read()\n",
    'if (a[0] == "b\\n") { return x->y::z; } // 100%',
    *(
        "naïve café",
        "Ångström",
        "e\u0301 a\u0308",
        "\u1e9e ß ﬁ ﬀ",
        "\uff21\uff22\uff11\uff12",
        "½ ² ™",
    ),
    *(
        "日本語のテキスト",
        "中文\uff0c测试。",
        "한국어 문장",
        "Привет, мир",
        "مرحبا",
        "שלום",
        "हिन्दी",
    ),
    *("🙂", "👩‍👩‍👧‍👦 family", "🇩🇪🇯🇵", "✊🏽", "a\u200db", "\ufeffstart", "zero\u200bwidth"),
    *("\u2581", "a\u2581b", "\u00a0nbsp\u2003em", "\x00", "a\x00b", "\x7f\x1b[0m", "\U0010ffff"),
    *("<unk>", "<0x0A>", "<s></s>", "[INST] <<SYS>>", "http://example.org/?q=a+b&c=%20#d"),
)
_PARTS = (
    *(" ", "  ", "\n", "\t", "\r", "the", "model", "token", "s", "ing", "Un", "x", "Q", "0", "42"),
    *("é", "ß", "日本", "한", "🙂", "λ", "Ж", "ﬁ", "\u0627", "\u2581", "\u0301", "\u200d"),
    *(".", ",", "->", "(", ")", "{", '"', "'", "_", "\\"),
)


def probe_texts(control_texts: Sequence[str]) -> list[str]:
    """Return the texts to compare, always the same ones: several hundred, some that spell tokens.

    Args:
        control_texts: spellings of the tokenizer's control tokens.
    """
    spelled = [form for text in control_texts for form in (text, f"a {text}b", f"{text}{text}\n")]
    source = random.Random(_SEED)
    mixed = ("".join(source.choices(_PARTS, k=source.randint(1, 40))) for _ in range(_NUM_RANDOM))
    return [*_FIXED, *spelled, *mixed]


def check_tokenizer(content: bytes, tokenizer: Tokenizer, *, where: object) -> dict[str, int]:
    """Compare ids and decoded text of a tokenizer.json with those of the run's tokenizer.

    Args:
        content: the tokenizer.json to export.
        tokenizer: the run's own.
        where: the export, for the message.

    Returns:
        For the report: how many texts were compared.

    Raises:
        CheckpointError: they differ.
    """
    theirs = TokenizersTokenizer.from_str(content.decode("utf-8"))
    theirs.no_truncation()
    theirs.no_padding()
    theirs.encode_special_tokens = True
    added = theirs.get_added_tokens_decoder().values()
    # What is added and not special is vocabulary to transformers, whatever the settings.
    plain = [token.content for token in added if not token.special]
    texts = [
        text
        for text in probe_texts([token.content for token in added if token.special])
        if not any(each in text for each in plain)
    ]
    _require_equal(
        texts,
        tokenizer,
        encode=lambda text, has_beginning: (
            theirs.encode(text, add_special_tokens=has_beginning).ids
        ),
        decode=theirs.decode,
        where=where,
    )
    return {"compared_texts": len(texts)}


def check_auto_tokenizer(directory: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Compare what transformers makes of an exported directory with the run's tokenizer.

    Args:
        directory: the export, whose tokenizer.json was compared already.
        tokenizer: the run's own.

    Returns:
        For the report: the class, and how many texts were compared.

    Raises:
        CheckpointError: they differ, or an id is beyond the embedding.
    """
    from transformers import AutoTokenizer

    num_rows = int(read_json(directory, CONFIG_NAME)["vocab_size"])
    theirs = AutoTokenizer.from_pretrained(directory)
    added = theirs.added_tokens_decoder.values()
    plain = [token.content for token in added if not token.special]
    texts = [
        text
        for text in probe_texts(theirs.all_special_tokens)
        if not any(each in text for each in plain)
    ]
    _require_equal(
        texts,
        tokenizer,
        encode=lambda text, has_beginning: theirs(
            text, add_special_tokens=has_beginning, split_special_tokens=True
        )["input_ids"],
        decode=lambda ids: theirs.decode(ids, skip_special_tokens=True),
        where=f"transformers' {type(theirs).__name__} of {directory}",
    )
    if len(theirs) > num_rows or theirs.eos_token_id != tokenizer.eod:
        raise CheckpointError(
            f"transformers' tokenizer of {directory} has {len(theirs)} ids and ends with"
            f" {theirs.eos_token_id}; the model has {num_rows} ids, and the run's documents end"
            f" with {tokenizer.eod}; both must agree; export with --no-tokenizer"
        )
    return {"class": type(theirs).__name__, "compared_texts": len(texts)}


def _require_equal(
    texts: Sequence[str], tokenizer: Tokenizer, *, encode: Any, decode: Any, where: object
) -> None:
    different = list(_differences(texts, tokenizer, encode=encode, decode=decode))
    if different:
        text, own, others = different[0]
        raise CheckpointError(
            f"{where}: the tokenizer differs from the run's on {len(different)} of {len(texts)}"
            f" texts, first on {text!r:.80}: {others!r:.120} instead of {own!r:.120}; an export"
            " must give the ids that the model was trained on; export with --no-tokenizer and name"
            " the tokenizer yourself"
        )


def _differences(
    texts: Sequence[str], tokenizer: Tokenizer, *, encode: Any, decode: Any
) -> Iterator[tuple[str, object, object]]:
    """Yield the texts whose ids or decoded text differ, with both."""
    for text in texts:
        ids = tokenizer.encode(text)
        pairs = [(ids, encode(text, False)), (tokenizer.decode(ids), decode(ids))]
        if ids:
            pairs.append((tokenizer.encode_document(text), encode(text, True)))
        for own, others in pairs:
            if own != others:
                yield text, own, others
                break
