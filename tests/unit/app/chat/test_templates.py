"""Compares texts, tokens and masks of the project's templates with transformers'."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizersTokenizer
from transformers import PreTrainedTokenizerFast

from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer
from megatron.trainer.errors import DataError
from moe_app.chat.dialogue import Dialogue, Turn, Turns, counted_spans, is_counted
from moe_app.chat.samples import DialogueEncoder, Sample
from moe_app.chat.templates import TEMPLATES, BuiltinTemplate, jinja_source
from moe_app.convert.sentencepiece_json import to_tokenizer_json
from tests.unit.app.chat.make_chat import (
    END,
    ODD,
    as_messages,
    make_tokenizer,
    transformers_reads,
)
from tests.unit.trainer.data.make_tokenizers import make_sentencepiece

Both = tuple[Tokenizer, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    """Gives tokenizers in the project's and in transformers' reading, by kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {"byte-level": make_tokenizer(folder / "bpe")}
    for name, adds_space in (("sentencepiece", False), ("sentencepiece, space first", True)):
        path = make_sentencepiece(
            folder / name, control=[END], add_dummy_prefix=adds_space, unk_surface="?"
        )
        exported = folder / name / "exported.json"
        exported.write_bytes(to_tokenizer_json(Path(path).read_bytes()))
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(exported), eos_token=END)
        found[name] = load_tokenizer("SentencePieceTokenizer", path), theirs
    return found


def encode(template: str, tokenizer: Tokenizer, turns: Turns) -> Sample:
    encoder = DialogueEncoder(
        tokenizer=tokenizer,
        template=BuiltinTemplate(template, tokenizer),
        train_on="assistant",
        seq_length=1 << 20,
        overlong="error",
    )
    return encoder.encode_whole(Dialogue(turns=turns))


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "sentencepiece, space first"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ODD)
def test_tokens_and_mask_are_those_of_transformers(
    name: str, template: str, kind: str, tokenizers: dict[str, Both]
) -> None:
    ours, theirs = tokenizers[kind]
    sample = encode(template, ours, ODD[name])
    ids, mask = transformers_reads(theirs, ODD[name], jinja_source(template, ours))
    assert sample.ids.tolist() == ids
    assert sample.counted.tolist() == mask
    has_assistant = any(turn.role == "assistant" for turn in ODD[name])
    assert (sample.num_counted > 0) == has_assistant


@pytest.mark.parametrize("template", TEMPLATES)
def test_generation_begins_where_the_counted_tokens_do(
    template: str, tokenizers: dict[str, Both]
) -> None:
    ours, theirs = tokenizers["byte-level"]
    turns = ODD["plain"]
    sample = encode(template, ours, turns)
    prompt = theirs.apply_chat_template(
        as_messages(turns[:-1]),
        chat_template=jinja_source(template, ours),
        add_generation_prompt=True,
        return_dict=False,
    )
    first = sample.counted.tolist().index(True)
    assert sample.ids[:first].tolist() == prompt
    answer = ours.encode("jumps over")
    assert sample.ids[sample.counted].tolist() == [*answer, ours.eod]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "sentencepiece, space first"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_special_tokens_that_a_turn_spells_stay_text(
    template: str, kind: str, tokenizers: dict[str, Both]
) -> None:
    ours, _ = tokenizers[kind]
    spelled = f"end {END} here"
    turns = (Turn("user", f"{spelled}\n"), Turn("assistant", f"{END}{spelled}"))
    sample = encode(template, ours, turns)
    placed = [ours.eod] * {"olmoe": 2, "zephyr": 2}[template]
    assert [each for each in sample.ids.tolist() if each == ours.eod] == placed
    # All but the placed tokens are what their stretches are as ordinary text.
    whole = BuiltinTemplate(template, ours).render(turns).text
    stretches = {
        "olmoe": [whole.removeprefix(END).removesuffix(END)],
        "zephyr": [
            f"<|user|>\n{spelled}\n",
            f"\n<|assistant|>\n{END}{spelled}",
            "\n",
        ],
    }[template]
    expected = [each for stretch in stretches for each in ours.encode(stretch)]
    assert [each for each in sample.ids.tolist() if each != ours.eod] == expected


def make_olmoe_miniature(path: Path) -> str:
    """Write a tokenizer with OLMoE's ids for single bytes and for the words of its markers."""
    # Bytes that no UTF-8 has are missing there.
    missing = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - missing)
    vocab = {letter: 2 + number for number, letter in enumerate(alphabet)} | {END: 50279}
    words = {"user": 4537, "ass": 515, "istant": 5567, "|>": 49651}
    merges = []
    for word, token_id in words.items():
        for end in range(2, len(word) + 1):
            vocab.setdefault(word[:end], 60_000 + len(vocab))
            merges.append((word[: end - 1], word[end - 1]))
        vocab[word] = token_id
    made = TokenizersTokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([AddedToken(END, special=True)])
    made.save(str(path))
    return str(path)


def test_olmoe_markers_have_the_ids_of_the_published_logs(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("HFTokenizer", make_olmoe_miniature(tmp_path / "tokenizer.json"))
    turns = (Turn("user", "\\o/"), Turn("assistant", "!"))
    sample = encode("olmoe", tokenizer, turns)
    user, assistant = [29, 93, 4537, 49651, 187], [29, 93, 515, 5567, 49651, 187]
    question = tokenizer.encode("\\o/\n")
    answer = tokenizer.encode("!")
    assert sample.ids.tolist() == [50279, *user, *question, *assistant, *answer, 50279]
    assert sample.counted.tolist() == [False] * (1 + 5 + len(question) + 6) + [True] * 2


def test_unknown_role_is_refused(tokenizers: dict[str, Both]) -> None:
    ours, _ = tokenizers["byte-level"]
    with pytest.raises(DataError, match="turn 2 has the role 'tool'"):
        encode("olmoe", ours, (Turn("user", "a"), Turn("tool", "b")))


def test_choice_of_what_counts(tokenizers: dict[str, Both]) -> None:
    ours, _ = tokenizers["byte-level"]
    turns = tuple(Turn(role, "x") for role in ("user", "assistant", "user", "assistant", "user"))
    rendered = BuiltinTemplate("olmoe", ours).render(turns)

    def counted(train_on: str, first: int = 0) -> list[str]:
        dialogue = Dialogue(turns=turns, first_counted=first)
        spans = counted_spans(rendered, dialogue, train_on)  # type: ignore[arg-type]
        return [rendered.text[begin:end] for begin, end in spans]

    assert counted("assistant") == [f"x{END}", f"x{END}"]
    assert counted("last") == [f"x{END}"]
    assert counted_spans(rendered, Dialogue(turns=turns), "last")[0][0] > len(rendered.text) // 2
    assert counted("assistant", 2) == counted("last")
    assert counted("all") == [rendered.text]


def test_token_counts_where_it_overlaps_a_span() -> None:
    offsets = [(0, 2), (2, 4), (4, 4), (4, 6), (6, 8), (8, 9)]
    assert is_counted(offsets, [(3, 6), (8, 9)]) == [False, True, True, True, False, True]
    assert is_counted(offsets, []) == [False] * 6
