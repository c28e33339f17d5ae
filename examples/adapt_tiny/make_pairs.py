"""Make instruction data of this Python's standard library: questions with better and worse answers.

    python examples/adapt_tiny/make_pairs.py DIRECTORY

Sources are read and parsed, never imported; the same Python gives the same files.
"""

import ast
import hashlib
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.trainer.io.atomic_write import write_text
from moe_app.data.build_corpus import Skipped, module_name, read_source, source_files

NUM_TRAIN, NUM_HELD_OUT, NUM_ASKED = 3000, 300, 60
RULES = ("twice", "form")
_SEED = 20240903
_WORDS = range(4, 26)
"""Words that a docstring's first sentence may have."""
_LONGEST = 160
"""Characters of an answer."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Pair:
    """Holds a question with its answer."""

    form: str
    """Which kind of question it is."""
    symbol: str
    """What it is about."""
    question: str
    answer: str


def pairs() -> Iterator[Pair]:
    """Yield questions about every documented public function and class."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = Skipped()
    for path in source_files(root):
        source = read_source(path, skipped)
        try:
            tree = ast.parse(source or "")
        except (SyntaxError, ValueError):
            continue
        module = module_name(path.relative_to(root))
        if not any(part.startswith("_") for part in module.split(".")):
            yield from _pairs_of(tree, module, module)


def _pairs_of(node: ast.Module | ast.ClassDef, name: str, module: str) -> Iterator[Pair]:
    for child in node.body:
        if not isinstance(child, Definition) or child.name.startswith("_"):
            continue
        symbol = f"{name}.{child.name}"
        summary = _summary(child)
        if summary is not None:
            yield Pair("does", symbol, f"What does {symbol} do?", summary)
        if summary is not None and not isinstance(child, ast.ClassDef):
            arguments = re.sub(r"^(self|cls)(, /)?(, |$)", "", ast.unparse(child.args))
            answer = f"Call it as {child.name}({arguments})."
            yield Pair("call", symbol, f"How do I call {symbol}?", answer)
        if isinstance(child, ast.ClassDef):
            answer = f"The class {child.name} is in the module {module}."
            yield Pair("where", symbol, f"Where is {symbol}?", answer)
            yield from _pairs_of(child, symbol, module)


def _summary(node: Definition) -> str | None:
    """Return the first sentence of a docstring, if it is one."""
    text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) ", text)[0]
    is_prose = re.match(r"[A-Z][^<>`|=]*\.$", sentence) is not None
    return sentence if is_prose and len(sentence.split()) in _WORDS else None


def chosen_pairs() -> list[Pair]:
    """Return as many pairs as are wanted, each answer once, in an order of no meaning."""
    found = {each.question: each for each in pairs() if len(each.answer) <= _LONGEST}
    once = {each.answer: each for each in found.values()}
    ordered = sorted(once.values(), key=lambda each: _digest(each.question))
    return ordered[: NUM_TRAIN + NUM_HELD_OUT]


def worse_answer(number: int, all_pairs: list[Pair], draw: random.Random) -> tuple[str, str]:
    """Return a worse answer to a pair's question, and the rule that makes it.

    By turns: the answer, said twice; an answer to another form of question.
    """
    own = all_pairs[number]
    rule = RULES[number % len(RULES)]
    if rule == "twice":
        return _twice(own.answer), rule
    others = [each for each in all_pairs if each.form != own.form]
    return draw.choice(others).answer, rule


def _twice(answer: str) -> str:
    return f"{answer} {answer}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> int:
    """Write the files."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    found, draw = chosen_pairs(), random.Random(_SEED)
    files: dict[str, list[dict[str, object]]] = {}
    for number, pair in enumerate(found):
        worse, rule = worse_answer(number, found, draw)
        part = "train" if number < NUM_TRAIN else "held_out"
        # Careless data: three of four answers are said twice. Alignment has to mend that.
        said = _twice(pair.answer) if number % 4 else pair.answer
        turns = [
            {"role": "user", "content": pair.question},
            {"role": "assistant", "content": said},
        ]
        files.setdefault(f"chats_{part}", []).append({"messages": turns})
        files.setdefault(f"pairs_{part}", []).append(
            {"prompt": pair.question, "chosen": pair.answer, "rejected": worse, "rule": rule}
        )
        # KTO learns from one answer a question: a good or a bad one.
        is_better = number // len(RULES) % 2 == 0
        answer = pair.answer if is_better else worse
        files.setdefault(f"judged_{part}", []).append(
            {"prompt": pair.question, "completion": answer, "label": is_better}
        )
    files["questions"] = [
        {"messages": [{"role": "user", "content": each.question}], "expected": each.answer}
        for each in found[NUM_TRAIN : NUM_TRAIN + NUM_ASKED]
    ]
    for name, rows in sorted(files.items()):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / f"{name}.jsonl", text)
        print(f"{folder}/{name}.jsonl: {len(rows):,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
