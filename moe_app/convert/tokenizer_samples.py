"""Makes the texts on which two tokenizers are compared: the same ones each time."""

# ruff: noqa: RUF001 - the letters that look like others are meant

import random
from collections.abc import Iterable, Iterator, Sequence

_SEED = 12
_NUM_RANDOM = 400

_WORDS = (
    "",
    "a",
    "hello world",
    "The quick brown fox jumps over the lazy dog.",
    "don't, won't; it's: 'quoted' \"text\" (and) [more] {here} <tag/> & so on ...",
    "CamelCase snake_case kebab-case ALLCAPS mIxEd https://example.org/a?b=c&d=%20e#f",
    "0 1 12 123 1234567890 3.14159 -1e-10 0xDEADBEEF 1,000,000 ½ ² ٣ ४ ５",
    "def f(x):\n    if x:\n\treturn x ** 2  # square\n\n\nclass A:\r\n\tpass\r\n",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\n\\t\\u00e9"}}',
    "naïve café Ångström Żółć ğüşiöç Straße ﬁne ﬀ Ĳssel",
    "e\u0301 e\u0301\u0323 o\u0308\u0304 n\u0303 A\u030a \u0301alone \u1e69 s\u0323\u0307",
    "日本語のテキスト、漢字とかな。 中文没有空格！ 한국어 문장 \u1112\u1161\u11ab",
    "ｆｕｌｌ　ｗｉｄｔｈ ㍿ ① Ⅳ ㎏ ™ ª …",
    "Привет, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดี",
    "😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇯🇵🇩🇪 ❤️ ☺︎ 1️⃣",
    "∑∫√∞ ≠≤≥ → ← ⇒ ℝ ℵ α β γ 𝔘𝔫𝔦 𝒳 𐍈 𒀀 𠜎 \U0010fffd",
    "\u2581 \u2581\u2581a b\u2581c \u2585",
    "zero\u200bwidth\u200d \u200c \ufeffmark \u00ad \u2060 \u202eright\u202c",
    "no\u00a0break thin\u2009space em\u2003space ideo\u3000graphic line\u2028para\u2029next\u0085",
    "\x00 \x01\x02 \x07 \x1b[31m \x7f \x80\x9f \ufffd \ufffe \uffff",
    "<unk> <s> </s> <pad> <0x0A> <0x41> [UNK] [CLS] <|endoftext|> <|im_start|>",
)

_SPACES = (" ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2581", "\x0b", "\x0c")
_RANGES = (
    (0x20, 0x7F),
    (0x20, 0x7F),
    (0x00, 0x20),
    (0xA0, 0x180),
    (0x300, 0x370),
    (0x370, 0x530),
    (0x590, 0x780),
    (0x900, 0xE80),
    (0x2000, 0x2070),
    (0x2190, 0x2C00),
    (0x3040, 0x3100),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A4),
    (0xF900, 0xFFF0),
    (0x10000, 0x10100),
    (0x1F300, 0x1FAFF),
    (0x20000, 0x20100),
)
"""Blocks of code points; ASCII counts twice."""


def sample_texts(tokens: Iterable[str]) -> list[str]:
    """Return several hundred varied texts.

    Runs of spaces, newlines and tabs, accents and combining marks, scripts with and without
    spaces, emoji with joiners, bytes, code, digits, long texts, and the tokens' own spelling.

    Args:
        tokens: tokens, among them those that only a program places.
    """
    draw = random.Random(_SEED)
    spelled = list(tokens)
    texts = [*_WORDS, *_runs(), *_spellings(spelled)]
    texts += [_random_text(draw, draw.randrange(1, 60)) for _ in range(_NUM_RANDOM)]
    texts += [_mixed(draw, texts) for _ in range(100)]
    texts += [" ".join(_WORDS) * 3, "a" * 3000, " " * 1000, "ab " * 1000, "é日" * 500]
    return list(dict.fromkeys(texts))


def _runs() -> Iterator[str]:
    """Yield runs of each kind of space: alone, at both ends, between words."""
    for space in _SPACES:
        for count in (1, 2, 3, 4, 7, 8, 17):
            yield space * count
            yield f"{space * count}a{space * count}b c{space * count}"


def _spellings(tokens: Sequence[str]) -> Iterator[str]:
    """Yield what spells a token: alone, within text, cut short, twice."""
    for token in tokens:
        yield token
        yield f"before{token}after {token} and {token}{token}"
        yield token[:-1]
        yield f" {token[1:]}"


def _random_text(draw: random.Random, length: int) -> str:
    characters = []
    for _ in range(length):
        start, stop = draw.choice(_RANGES)
        characters.append(chr(draw.randrange(start, stop)))
        if draw.random() < 0.2:
            characters.append(draw.choice(_SPACES) * draw.choice((1, 1, 1, 2, 5)))
    return "".join(characters)


def _mixed(draw: random.Random, texts: Sequence[str]) -> str:
    return draw.choice(("", " ", "\n", "  ")).join(draw.choices(texts, k=3))
