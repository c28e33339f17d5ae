"""Reads tokenizer.json files of the `tokenizers` library."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as TokenizersTokenizer

from megatron.trainer.data.document_end import DocumentEnd, choose_end, is_marker
from megatron.trainer.data.encoding import Encoding, Ids, Span, encode_between, overlaps
from megatron.trainer.data.hf_words import make_hf_word_cache
from megatron.trainer.data.tokenizer_files import (
    TokenizerSettings,
    read_settings,
    read_tokenizer_file,
    reading,
)
from megatron.trainer.data.word_cache import WordCache
from megatron.trainer.errors import DataError

_KIND_NAME = "a tokenizers JSON file"
_LARGEST_ID = (1 << 31) - 1
"""Of a token in a token file."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
"""How a word of most models without a byte alphabet writes a space."""
_MARK = re.compile(r"<.+>|\[.+\]")


class HFTokenizer:
    """Reads a tokenizer.json, and the settings beside it.

    No text becomes a control token. These are the added tokens that are marked special, that are
    written like `<|im_end|>`, that end documents, or that the files beside the tokenizer name as
    begin, end, padding or another special token. Other added tokens, such as runs of spaces or
    `|||EMAIL_ADDRESS|||`, are vocabulary.

    Args:
        path: The .json file.
        eod_token: The token that ends a document; None takes the one that `choose_end` finds.

    Raises:
        DataError: A file cannot be read, or nothing names a token that ends documents.
    """

    def __init__(self, path: str, *, eod_token: str | None = None) -> None:
        data = read_tokenizer_file(path)
        self._path = path
        with reading(path, _KIND_NAME):
            self._tokenizer = TokenizersTokenizer.from_buffer(data)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size: int = self._count_ids()
        self._added: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        settings = read_settings(Path(path).parent)
        self._control: set[int] = set()
        self._add_control(self._control_ids(settings))
        self.end: DocumentEnd = choose_end(self, settings, path=path, eod_token=eod_token)
        self.eod: int = self.end.token_id
        self._add_control({self.eod})
        self._refused = frozenset(self._control - self._fallback_ids(settings))
        self.prefix: tuple[int, ...] = self._find_prefix(settings)

    def encode(self, text: str) -> list[int]:
        """Return text's ids; text that spells a control token is ordinary text.

        Raises:
            DataError: The text becomes a control token all the same: the model of the tokenizer
                has it as a word.
        """
        ids = self._encode(text)
        self._refuse_control(ids)
        return ids

    def encode_document(self, text: str) -> list[int]:
        """Return the ids of a text that begins a document: `prefix`, then the text's."""
        ids = self.encode(text)
        return [*self.prefix, *ids] if ids else ids

    def encode_written(self, text: str, as_text: Sequence[Span] = ()) -> Encoding:
        """Return the tokens of a text in which control tokens are written, without a `prefix`.

        They are those that transformers gives to the text, apart from what `as_text` changes.

        Args:
            text: What a template made.
            as_text: Where in it control tokens are only spelled, and are ordinary text.

        Raises:
            DataError: A spelled token cannot be kept as text by this tokenizer.
        """
        with reading(self._path, _KIND_NAME):
            whole = self._reader_of_tokens.encode(text, add_special_tokens=False)
        if not as_text:
            return Encoding(whole.ids, whole.offsets)
        placed = [
            (token_id, span)
            for token_id, span in zip(whole.ids, whole.offsets, strict=True)
            if token_id in self._control and not overlaps(span, as_text)
        ]
        return encode_between(text, placed, self._encode_stretch)

    def _encode_stretch(self, text: str, at: int) -> tuple[list[int], list[Span]]:
        """Return ids and offsets of a stretch that begins at a character of a longer text.

        Some tokenizers put a space before a text; within one, a line end takes it.
        """
        before = "" if at == 0 or self._is_alike_everywhere else "\n"
        ids = self.encode(before + text)
        if not before:
            return ids, self._offsets_of(text)
        own = len(self.encode(before))
        if ids[:own] != self.encode(before):
            raise DataError(
                f"the text {text[:40]!r} cannot be encoded within another one by {self._path}: its"
                " tokens depend on what is before them; take the control tokens that it spells out"
                " of the text"
            )
        offsets = self._offsets_of(before + text)[own:]
        return ids[own:], [(first - 1, last - 1) for first, last in offsets]

    def _offsets_of(self, text: str) -> list[Span]:
        offsets: list[Span] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    @cached_property
    def _reader_of_tokens(self) -> TokenizersTokenizer:
        """Return the tokenizer that takes what spells a control token for it."""
        return TokenizersTokenizer.from_str(self._tokenizer.to_str())

    @cached_property
    def _is_alike_everywhere(self) -> bool:
        """Return whether a text has the same tokens after a control token as at the beginning."""
        control = next(iter(self.control_texts()), "")
        whole = self._reader_of_tokens.encode(f"{control}a", add_special_tokens=False).ids
        return not control or whole[1:] == self.encode("a")

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """Return what `encode_document` does for each text.

        Where the file allows it, words that were seen before are not encoded again.
        """
        words = self._word_cache
        with reading(self._path, _KIND_NAME):
            found = words.encode(texts) if words else [*map(self._encode_alone, texts)]
        for ids in found:
            if np.isin(ids, self._refused_ids).any():
                self._refuse_control(ids.tolist())
        if not self.prefix:
            return found
        return [np.concatenate([self.prefix, ids]) if ids.size else ids for ids in found]

    def _encode_alone(self, text: str) -> Ids:
        """Return the ids of one text.

        The library takes half as long again where it notes the place of each token in the text, as
        it does without a batch; and of several texts it encodes as many at once as there are cores.
        """
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    @cached_property
    def _word_cache(self) -> WordCache | None:
        return make_hf_word_cache(self._tokenizer, self._encode_alone, vocab_size=self.vocab_size)

    @cached_property
    def _refused_ids(self) -> Ids:
        return np.array(sorted(self._refused), np.int32)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without a `prefix` at their beginning."""
        count = len(self.prefix)
        shown = ids[count:] if count and tuple(ids[:count]) == self.prefix else ids
        with reading(self._path, _KIND_NAME):
            text: str = self._tokenizer.decode(shown, skip_special_tokens=False)
        return text

    def num_bytes(self, token_id: int) -> int:
        """Return the UTF-8 bytes of the text that a token stands for; 0 for a control token."""
        text = self.token_text(token_id)
        if text is None or token_id in self._control:
            return 0
        if (added := self._added.get(token_id)) is not None:
            is_marked = added.normalized and self._marks_before_added
            return len((text.replace(_SPACE, " ") if is_marked else text).encode())
        if self._has_byte_alphabet:
            return len(text)
        return 1 if _BYTE.fullmatch(text) else len(text.replace(_SPACE, " ").encode())

    @cached_property
    def _marks_before_added(self) -> bool:
        """Return whether spaces are marks already where added tokens are found in normalized text.

        Where the normalizer does not write them, the text itself has the mark of such a token.
        """
        normalizer = self._tokenizer.normalizer
        return normalizer is not None and f"a{_SPACE}a" in normalizer.normalize_str("a a")

    @cached_property
    def _has_byte_alphabet(self) -> bool:
        """Return whether each character of a word of the model stands for a byte."""
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        parts = decoder.get("decoders", [decoder])
        return any(part.get("type") == "ByteLevel" for part in parts)

    def token_id(self, text: str) -> int | None:
        """Return the id of the token that is written `text`; None for none."""
        token_id: int | None = self._tokenizer.token_to_id(text)
        return token_id

    def token_text(self, token_id: int) -> str | None:
        """Return how a token is written; None for an id that is none."""
        text: str | None = None
        if 0 <= token_id < self.vocab_size:
            text = self._tokenizer.id_to_token(token_id)
        return text

    def can_be_text(self, token_id: int) -> bool:
        """Return whether ordinary text can become this token, if it does not end documents.

        Some files have `</s>` as a word of the model; `encode` refuses the texts that become it.
        """
        written = self.token_text(token_id) or ""
        return token_id not in self._added and _MARK.fullmatch(written) is None

    def control_texts(self) -> list[str]:
        """Return the tokens that no text becomes."""
        return [text for each in sorted(self._control) if (text := self.token_text(each))]

    def _encode(self, text: str) -> list[int]:
        with reading(self._path, _KIND_NAME):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _refuse_control(self, ids: list[int]) -> None:
        if not self._refused.isdisjoint(ids):
            found = next(each for each in ids if each in self._refused)
            raise DataError(
                f"a text spells {self.token_text(found)!r}, which the model of {self._path} reads"
                f" as the token {found}; only the program may place that one; take it out of the"
                " text, or use another tokenizer"
            )

    def _count_ids(self) -> int:
        """Return one more than the largest id."""
        largest: int = max(self._tokenizer.get_vocab().values(), default=-1)
        if largest > _LARGEST_ID:
            raise DataError(
                f"{self._path} has the id {largest}; ids must be at most {_LARGEST_ID}, as token"
                " files store them; restore the file"
            )
        return largest + 1

    def _control_ids(self, settings: TokenizerSettings) -> set[int]:
        """Return the added tokens that only the program may place, as far as files say it."""
        special = settings.special_texts()
        named = {each for role in ("bos", "eos", "pad") for _, each in settings.named_ids(role)}
        return {
            token_id
            for token_id, token in self._added.items()
            if token.special
            or is_marker(token.content)
            or token.content in special
            or (token_id in named and token.content.strip())
        }

    def _add_control(self, ids: set[int]) -> None:
        """Let no text become these tokens: the library leaves out those that are special."""
        plain = [self._added[each] for each in sorted(ids & self._added.keys())]
        self._tokenizer.add_special_tokens(
            [
                AddedToken(
                    token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=True,
                )
                for token in plain
                if not token.special
            ]
        )
        self._control |= ids

    def _fallback_ids(self, settings: TokenizerSettings) -> set[int]:
        """Return the ids that stand for text of which the tokenizer has no words."""
        model = self._tokenizer.model
        texts = ["<unk>", getattr(model, "unk_token", None) or ""]
        texts += [f"<0x{byte:02X}>" for byte in range(256)]
        named = settings.named_text("unk")
        texts += [named[1]] if named is not None else []
        ids = {each for text in texts if (each := self.token_id(text)) is not None}
        if isinstance(model, models.Unigram):
            ids.add(json.loads(self._tokenizer.to_str())["model"]["unk_id"])
        return ids

    def _find_prefix(self, settings: TokenizerSettings) -> tuple[int, ...]:
        """Return what is put before each text: by tokenizer_config.json, or by the file itself."""
        with reading(self._path, _KIND_NAME):
            encoding = self._tokenizer.encode("a", add_special_tokens=True)
        count = next((i for i, each in enumerate(encoding.special_tokens_mask) if not each), 0)
        own = tuple(encoding.ids[:count])
        if settings.adds_bos is None or settings.adds_bos == bool(own):
            return own
        if not settings.adds_bos:
            return ()
        named = settings.named_text("bos")
        bos = None if named is None else self.token_id(named[1])
        if bos is None:
            raise DataError(
                f"{settings.directory / 'tokenizer_config.json'} puts a BOS before each text, but"
                f" names {'none' if named is None else f'{named[1]!r}, which is no token'}; set"
                " add_bos_token to false there, or restore the files"
            )
        return (bos,)
