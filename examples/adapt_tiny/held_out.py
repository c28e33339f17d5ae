"""Compare models on held-out pairs and questions, before and after they were adapted.

    python examples/adapt_tiny/held_out.py lines PAIRS TOKENIZER OUTPUT
    python examples/adapt_tiny/held_out.py accuracy BETA NAME=SCORED...
    python examples/adapt_tiny/held_out.py answers NAME=ANSWERED...

`lines` writes both answers of each pair as tokens for tools/score.py. `accuracy` reads what that
made of them, for several models; the first is the reference of rewards. `answers` shows what models
answered to the same questions.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.trainer.data.tokenizer import load_tokenizer
from megatron.trainer.io.atomic_write import write_text
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.chat.chat_rows import read_unit
from moe_app.chat.samples import DialogueEncoder
from moe_app.chat.templates import BuiltinTemplate

TEMPLATE, SEQ_LENGTH, SHOWN = "olmoe", 256, 6

Rows = list[dict[str, Any]]


def read(path: str) -> Rows:
    """Return the rows of a file."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def lines(pairs: str, tokenizer: str, output: str) -> None:
    """Write a line for each answer: its tokens after the question's, and how many are its own."""
    encodes = load_tokenizer("SentencePieceTokenizer", tokenizer)
    encoder = DialogueEncoder(
        tokenizer=encodes,
        template=BuiltinTemplate(TEMPLATE, encodes),
        train_on="assistant",
        seq_length=SEQ_LENGTH,
        overlong="drop",
    )
    made = []
    for number, row in enumerate(read(pairs)):
        unit = read_unit(row, "preference", ChatDataConfig())
        samples = [encoder.encode_whole(each) for each in unit.dialogues]
        if max(len(each.ids) for each in samples) > SEQ_LENGTH:  # left out of training, too
            continue
        for sample in samples:
            made.append(
                {
                    "pair": number,
                    "rule": row["rule"],
                    "num_answer": sample.num_counted,
                    "tokens": sample.ids.tolist(),
                }
            )
    write_text(Path(output), "".join(json.dumps(each) + "\n" for each in made))


def accuracy(beta: str, named: Sequence[str]) -> None:
    """Print for each model how often it thinks the better answer likelier, and its rewards."""
    models = {each.partition("=")[0]: read(each.partition("=")[2]) for each in named}
    (reference, known), *_ = models.items()
    rules = sorted({row["rule"] for row in known})
    print("pairs whose better answer is likelier, a token:")
    print(f"{'model':>8} " + " ".join(f"{rule:>8}" for rule in [*rules, "all"]))
    for name, rows in models.items():
        means = [sum(_answer(row)) / row["num_answer"] for row in rows]
        print(f"{name:>8} {_shares([a > b for a, b in _paired(means)], rows, rules)}")
    print(
        f"pairs whose better answer has the higher reward, beta {beta}, reference {reference};"
        " mean rewards of better and worse ones:"
    )
    before = [sum(_answer(row)) for row in known]
    for name, rows in list(models.items())[1:]:
        rewards = [
            float(beta) * (sum(_answer(row)) - each) for row, each in zip(rows, before, strict=True)
        ]
        both = _paired(rewards)
        means = [sum(each) / len(both) for each in zip(*both, strict=True)]
        shares = _shares([a > b for a, b in both], rows, rules)
        print(f"{name:>8} {shares}   {means[0]:+.2f} {means[1]:+.2f}")


def _answer(row: dict[str, Any]) -> list[float]:
    """Return the log-probabilities of an answer's tokens."""
    return list(row["token_logprobs"][-row["num_answer"] :])


def _paired(values: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _shares(is_right: Sequence[bool], rows: Rows, rules: Sequence[str]) -> str:
    """Format the share of pairs that are right, for each rule and for all."""
    own = [row["rule"] for row in rows[::2]]
    chosen = [
        [is_it for is_it, each in zip(is_right, own, strict=True) if each == rule] for rule in rules
    ]
    return " ".join(f"{sum(each) / len(each):8.1%}" for each in [*chosen, list(is_right)])


def answers(named: Sequence[str]) -> None:
    """Print the first questions with all models' answers, and counts over all questions."""
    models = {each.partition("=")[0]: read(each.partition("=")[2]) for each in named}
    first = next(iter(models.values()))
    for number, asked in enumerate(first[:SHOWN]):
        print(f"Q: {asked['messages'][0]['content']}")
        print(f"   expected: {asked['expected']}")
        for name, rows in models.items():
            print(f"   {name:>8}: {' '.join(rows[number]['completion'].split())[:160]}")
    print(
        f"of {len(first)} answers: that end by themselves, that are the expected one, that say a"
        " sentence twice:"
    )
    for name, rows in models.items():
        ended = sum(row["finish_reason"] == "stop" for row in rows)
        exact = sum(row["completion"].strip() == row["expected"] for row in rows)
        twice = sum(_is_said_twice(row["completion"]) for row in rows)
        print(f"{name:>8}: {ended:3} {exact:3} {twice:3}")


def _is_said_twice(text: str) -> bool:
    sentences = [each for each in text.replace("\n", " ").split(". ") if each]
    return len({each.strip(" .") for each in sentences}) < len(sentences)


def main() -> int:
    """Do what the first argument says."""
    what, *rest = sys.argv[1:]
    if what == "lines":
        lines(*rest)
    elif what == "accuracy":
        accuracy(rest[0], rest[1:])
    else:
        answers(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
