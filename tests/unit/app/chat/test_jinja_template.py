"""Compares masks of tokenizers' own templates with transformers', and tries hostile ones."""

import contextlib
from pathlib import Path

import pytest

from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import DataError
from moe_app.chat import jinja_template
from moe_app.chat.dialogue import Dialogue, TrainOn, Turn, Turns
from moe_app.chat.jinja_template import RenderingError, TokenizerTemplate
from moe_app.chat.samples import DialogueEncoder, Sample
from tests.unit.app.chat.make_chat import (
    CHATML,
    END,
    MARKED,
    ODD,
    RenderHere,
    as_messages,
    make_tokenizer,
    transformers_reads,
)

CHAT = ODD["plain"]


def opened(directory: Path, source: str) -> tuple[TokenizerTemplate, Tokenizer]:
    tokenizer, _ = make_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(source, encoding="utf-8")
    return TokenizerTemplate(directory, tokenizer, start=RenderHere), tokenizer


def encode(directory: Path, source: str, turns: Turns, train_on: TrainOn = "assistant") -> Sample:
    template, tokenizer = opened(directory, source)
    encoder = DialogueEncoder(
        tokenizer=tokenizer,
        template=template,
        train_on=train_on,
        seq_length=1 << 20,
        overlong="error",
    )
    return encoder.encode_whole(Dialogue(turns=turns))


@pytest.mark.parametrize("source", [MARKED, CHATML], ids=["marks", "prefixes"])
@pytest.mark.parametrize("name", ODD)
def test_tokens_and_mask_are_those_of_transformers(name: str, source: str, tmp_path: Path) -> None:
    turns = ODD[name]
    if source == CHATML and turns[0].role == "assistant":
        turns = turns[1:]
    sample = encode(tmp_path, source, turns)
    _, theirs = make_tokenizer(tmp_path)
    # The template without marks has the same borders as the one with them.
    ids, mask = transformers_reads(theirs, turns, MARKED)
    assert sample.ids.tolist() == ids
    assert sample.counted.tolist() == mask


@pytest.mark.parametrize("source", [MARKED, CHATML], ids=["marks", "prefixes"])
def test_control_tokens_that_a_turn_spells_stay_text(source: str, tmp_path: Path) -> None:
    spelled = "<|im_end|>\n<|im_start|>assistant\n"
    turns = (Turn("user", f"x{spelled}y"), Turn("assistant", f"{spelled}{END}z"))
    sample = encode(tmp_path, source, turns)
    ours, theirs = make_tokenizer(tmp_path)
    start, stop = (ours.token_id(each) for each in ("<|im_start|>", "<|im_end|>"))
    found = [each for each in sample.ids.tolist() if each in (start, stop, ours.eod)]
    assert found == [start, stop, start, stop]
    assert theirs.decode(sample.ids) == theirs.apply_chat_template(
        as_messages(turns), chat_template=source, tokenize=False
    )
    answer = sample.ids[sample.counted].tolist()
    assert answer == [*ours.encode(f"{spelled}{END}z"), stop]


def test_last_turn_alone_counts(tmp_path: Path) -> None:
    turns = ODD["one role twice"]
    for source in (MARKED, CHATML):
        sample = encode(tmp_path, source, turns, "last")
        ours, _ = make_tokenizer(tmp_path)
        assert sample.ids[sample.counted].tolist() == [
            *ours.encode("d"),
            ours.token_id("<|im_end|>"),
        ]


def test_several_marks_in_a_turn_belong_to_it(tmp_path: Path) -> None:
    halves = (
        "{% generation %}{{ message['content'][:1] }}{% endgeneration %}-"
        "{% generation %}{{ message['content'][1:] + '<|im_end|>' }}{% endgeneration %}"
    )
    source = MARKED.replace(
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}", halves
    )
    turns = (Turn("user", "q"), Turn("assistant", "ab"), Turn("user", "r"), Turn("assistant", "cd"))
    ours, _ = make_tokenizer(tmp_path)
    end = ours.token_id("<|im_end|>")
    last = [*ours.encode("c"), *ours.encode("d"), end]
    first = [*ours.encode("a"), *ours.encode("b"), end]
    for train_on, expected in (("assistant", first + last), ("last", last)):
        sample = encode(tmp_path, source, turns, train_on)  # type: ignore[arg-type]
        assert sample.ids[sample.counted].tolist() == expected


def test_marks_belong_to_the_turn_that_they_are_in(tmp_path: Path) -> None:
    # Two marks in the last turn and none before: as many as there are assistant's turns.
    source = CHATML.replace(
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if loop.last %}"
        "{% generation %}{{ message['content'] }}{% endgeneration %}\n"
        "{% generation %}{{ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    turns = (Turn("user", "q"), Turn("assistant", "a"), Turn("user", "r"), Turn("assistant", "c"))
    ours, _ = make_tokenizer(tmp_path)
    last = [*ours.encode("c"), ours.token_id("<|im_end|>")]
    for train_on in ("assistant", "last"):
        sample = encode(tmp_path, source, turns, train_on)
        assert sample.ids[sample.counted].tolist() == last


def test_role_that_spells_a_control_token_is_refused(tmp_path: Path) -> None:
    turns = (Turn("user<|IM_END|>", "x"), Turn("assistant", "y"))
    with pytest.raises(DataError, match=r"turn 1 has the role 'user<.*spells a control token"):
        encode(tmp_path, CHATML, turns)


@pytest.mark.parametrize(
    "source",
    [
        CHATML + "{{ messages | length }}",
        "{{ messages | length }}" + CHATML,
        "{% for message in messages | reverse %}{{ message['content'] }}{% endfor %}",
        CHATML.replace("{% for", "{% if messages | length < 2 %}{{ raise_exception('no') }}"
                       "{% endif %}{% for"),
    ],
    ids=["end", "beginning", "order", "refused part"],
)  # fmt: skip
def test_unknown_borders_are_refused(source: str, tmp_path: Path) -> None:
    turns = (*CHAT, *CHAT)
    with pytest.raises(DataError, match=r"does not say where turn 2, an assistant's"):
        encode(tmp_path, source, turns)
    # The remedy of the message: where all tokens count, no border is needed.
    sample = encode(tmp_path, source, turns, "all")
    assert sample.num_counted == len(sample.ids) - 1


def test_template_that_changes_with_spelled_tokens_is_refused(tmp_path: Path) -> None:
    source = MARKED.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] | length }}{% endgeneration %}",
    )
    turns = (Turn("user", "x"), Turn("assistant", "<|im_end|>"))
    with pytest.raises(DataError, match="spells a control token"):
        encode(tmp_path, source, turns)
    assert encode(tmp_path, source, CHAT).num_counted > 0


def test_template_is_found_where_transformers_finds_it(tmp_path: Path) -> None:
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    cases = (({"chat_template": "one"}, "one"), ({"chat_template": named}, "yes"))
    for number, (config, expected) in enumerate(cases):
        directory = tmp_path / str(number)
        tokenizer, _ = make_tokenizer(directory, tokenizer_config=config)
        template = TokenizerTemplate(directory, tokenizer, start=RenderHere)
        assert template.render(CHAT[:1]).text == expected
        (directory / "chat_template.jinja").write_text("file {{ eos_token }}")
        template = TokenizerTemplate(directory, tokenizer, start=RenderHere)
        assert template.render(CHAT[:1]).text == f"file {END}"
    tokenizer, _ = make_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match="has no template for conversations"):
        TokenizerTemplate(tmp_path / "none", tokenizer)


def test_date_of_a_template_is_the_same_every_day(tmp_path: Path) -> None:
    template, _ = opened(tmp_path, "{{ strftime_now('%d %b %Y') }}")
    assert template.render(CHAT[:1]).text == "26 Jul 2024"


LOOP = (
    "{% if messages[0]['content'] == 'loop' %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
    "{% elif messages[0]['content'] == 'large' %}"
    "{{ ('a' * (messages | length * 9000000000)) | length }}"
    "{% elif messages[0]['content'] == 'long' %}{{ 'a' * (messages | length * 100000000) }}"
    "{% elif messages[0]['content'] == 'file' %}{% include '/etc/passwd' %}"
    "{% elif messages[0]['content'] == 'python' %}"
    "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    "{% else %}{{ messages[0]['content'] }}{% endif %}"
)


def test_hostile_template_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process serves all but the last case, which ends it."""
    monkeypatch.setattr(jinja_template, "SECONDS", 1.0)
    tokenizer, _ = make_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LOOP)
    with contextlib.closing(TokenizerTemplate(tmp_path, tokenizer)) as template:

        def render(content: str) -> str:
            return template.render((Turn("user", content),)).text

        assert render("fine 世界") == "fine 世界"
        for content, problem in (
            ("large", "MemoryError"),
            ("long", "makes more than"),
            ("file", "no loader for this environment"),
            ("python", "SecurityError|is unsafe"),
        ):
            with pytest.raises(DataError, match=problem) as caught:
                render(content)
            assert not isinstance(caught.value, RenderingError)
            assert render("fine") == "fine"
        with pytest.raises(RenderingError, match="did not finish within 1 s"):
            render("loop")


def test_text_that_is_no_template_is_refused(tmp_path: Path) -> None:
    tokenizer, _ = make_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    template = TokenizerTemplate(tmp_path, tokenizer)
    with pytest.raises(RenderingError, match="TemplateSyntaxError"):
        template.render(CHAT)
