"""Compare where texts end, and what is new of them, with searches in whole texts and bytes."""

import argparse
import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer
from megatron.trainer.errors import ConfigError
from megatron.trainer.inference.decode import Prompt, generate
from megatron.trainer.inference.sampling import greedy_token
from moe_app.data import train_tokenizer
from moe_app.infer.generate import make_parser, outcome
from moe_app.infer.stop import Stops, collect_stops, split_text

FILES = {"SentencePieceTokenizer": "tokenizer.model", "HFTokenizer": "tokenizer.json"}
WORDS = "the quick brown fox jumps over the lazy dog and runs away from it"
TEXT = "say caf\u00e9 \u65e5\u672c\u8a9e \U0001f600 the end"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Tokenizers of both kinds, to which every character beyond ASCII is several bytes."""
    folder = tmp_path_factory.mktemp("tokenizers")
    corpus = folder / "in.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{n} {WORDS}"}) + "\n" for n in range(300)))
    found = {}
    for kind, name in FILES.items():
        args = ["--input", str(corpus), "--output-dir", str(folder), "--tokenizer-type", kind]
        assert train_tokenizer.main([*args, "--vocab-size", "320"]) == 0
        found[kind] = load_tokenizer(kind, str(folder / name))
    return found


@pytest.fixture(params=FILES)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[request.param]


def arguments(*flags: str) -> argparse.Namespace:
    return make_parser().parse_args(["--load", "run", "--prompt", "x", *flags])


def test_prompt_and_completion_are_the_text_of_all_at_every_border(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    inside = 0
    for border in range(1, len(ids)):
        prompt, new = ids[:border], ids[border:]
        before, added = split_text(tokenizer, prompt, new)
        assert before + added == TEXT
        alone = tokenizer.decode(prompt)
        if "\ufffd" in alone:
            inside += 1
            assert added[0] in TEXT and not added[0].isascii()  # the character it ends inside
            assert before == alone.rstrip("\ufffd")
        else:
            assert before == alone
    assert inside >= 8


def test_completion_keeps_characters_that_are_replacements(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("a\ufffd")
    assert split_text(tokenizer, prompt, tokenizer.encode("b")) == ("a\ufffd", "b")
    cut = tokenizer.encode("\u65e5")[:-1]  # never completed
    before, added = split_text(tokenizer, cut, tokenizer.encode("b"))
    assert (before.strip("\ufffd"), added.strip("\ufffd")) == ("", "b")


class Recited:
    """Predicts the tokens of given texts, one text a row, whatever it is given."""

    def __init__(self, texts: list[list[int]], prompts: list[int], vocab_size: int) -> None:
        self.texts, self.prompts, self.vocab_size = texts, prompts, vocab_size
        self.passes = 0

    def next_logits(self, tokens: Tensor, position_ids: Tensor, last: Tensor) -> Tensor:
        self.passes += 1
        logits = torch.zeros(len(self.texts), self.vocab_size)
        for row, text in enumerate(self.texts):
            at = int(position_ids[row, last[row]]) + 1 - self.prompts[row]
            logits[row, text[min(at, len(text) - 1)]] = 5.0
        return logits

    def broadcast(self, values: list[int] | None, *, count: int) -> list[int]:
        assert values is not None and len(values) == count
        return values

    def all_reduce_max(self, values: list[int]) -> list[int]:
        return values


def recite(tokenizer: Tokenizer, stops: Stops, texts: list[list[int]]) -> list[list[int]]:
    prompts = [tokenizer.encode("the"), tokenizer.encode("the dog jumps"), [5]][: len(texts)]
    model = Recited(texts, [len(each) for each in prompts], tokenizer.vocab_size)
    made = [
        Prompt(
            ids=ids,
            sample=greedy_token,
            max_new_tokens=len(text),
            ends=lambda new, ids=ids: stops.ends(ids, new),  # type: ignore[misc]
        )
        for ids, text in zip(prompts, texts, strict=True)
    ]
    found = generate(model, made, stop_ids=stops.ids, vocab_size=tokenizer.vocab_size)
    assert model.passes == max(map(len, found))
    return found


@pytest.mark.parametrize("stop", ["x", " the", "caf\u00e9", "\u672c", "\u8a9e \U0001f600 t", "d"])
def test_text_ends_before_a_stop_wherever_tokens_end(tokenizer: Tokenizer, stop: str) -> None:
    ids = tokenizer.encode(TEXT)
    stops = collect_stops(arguments("--stop", "nowhere", stop), tokenizer, Path("/nowhere"))
    first, other = recite(tokenizer, stops, [ids, tokenizer.encode("o" * 20)])
    prompt = tokenizer.encode("the")
    ending = stops.find(tokenizer, prompt, first)
    if stop in TEXT:
        assert ending.reason == stop and ending.text == TEXT[: TEXT.index(stop)]
        # It went on to the token that completes the stop, and no further.
        assert stop not in split_text(tokenizer, prompt, first[:-1])[1]
    else:
        assert ending.reason is None and ending.text == TEXT
    assert len(other) == len(tokenizer.encode("o" * 20))  # one that stops ends no other
    assert stops.find(tokenizer, [5], other).reason is None


def test_any_of_several_tokens_stops(tokenizer: Tokenizer) -> None:
    a, b, c, d = (tokenizer.encode(letter)[-1] for letter in "abcd")
    flags = arguments("--stop-token-id", str(b), "--stop-token-id", str(c), str(d))
    stops = collect_stops(flags, tokenizer, Path("/nowhere"))
    assert set(stops.ids) == {tokenizer.eod, b, c, d}
    texts = [[a, c, a, b], [a, a, tokenizer.eod, a], [a, a, a, a]]
    assert recite(tokenizer, stops, texts) == [[a, c], [a, a, tokenizer.eod], [a, a, a, a]]
    ending = stops.find(tokenizer, [a], [a, c])
    assert outcome([a, c], ending) == {
        "completion": "a",
        "completion_tokens": [a, c],
        "finish_reason": "stop",
        "stop_reason": c,
    }
    assert ending.description.endswith(f"(id {c}), --stop-token-id")
    assert stops.find(tokenizer, [a], [tokenizer.eod]).description == "the end of the document"


@pytest.mark.parametrize("written", [7, [7], [7, 9]])
def test_ends_of_the_model_are_read_from_its_files(
    tokenizer: Tokenizer, tmp_path: Path, written: int | list[int]
) -> None:
    expected = {tokenizer.eod, *(written if isinstance(written, list) else [written])}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
    assert set(collect_stops(arguments(), tokenizer, tmp_path).ids) == expected
    (tmp_path / "hf_config.json").write_text(json.dumps({"eos_token_id": [8, 5000]}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": tokenizer.token_text(6)})
    )
    stops = collect_stops(arguments(), tokenizer, tmp_path)
    assert set(stops.ids) == expected | {6, 8}  # 5000 is none of the tokenizer's
    assert "the eos_token_id of hf_config.json" in stops.ids[8]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stop-token-id", "3", "320"], "--stop-token-id is 320; the tokenizer has the ids 0 to"),
        (["--stop-token-id", "-1"], "--stop-token-id is -1; the tokenizer has the ids 0 to 319;"),
        (["--stop", "a", ""], "--stop is ''; an empty text is everywhere; leave it out"),
        (["--stop", "a\udcff"], "--stop 'a\\udcff' is not UTF-8 at character 1;"),
    ],
)
def test_invalid_stops_are_refused(tokenizer: Tokenizer, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        collect_stops(arguments(*flags), tokenizer, Path("/nowhere"))


def test_ranks_that_get_the_stops_decide_as_the_one_that_read_them(tokenizer: Tokenizer) -> None:
    flags = arguments("--stop", "\u672c")
    stops = collect_stops(flags, tokenizer, Path("/nowhere"))
    sent = copy.deepcopy(stops)  # by what pickling takes apart and puts together
    ids = tokenizer.encode(TEXT)
    ends = [stops.ends([5], ids[:count]) for count in range(1, len(ids) + 1)]
    assert ends == [sent.ends([5], ids[:count]) for count in range(1, len(ids) + 1)]
    assert ends == sorted(ends) and True in ends and False in ends
    assert sent.ids == stops.ids
