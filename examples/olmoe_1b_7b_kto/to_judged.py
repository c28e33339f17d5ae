"""Make judged answers of preference pairs: of each pair the better one, then the worse one.

    python examples/olmoe_1b_7b_kto/to_judged.py OUTPUT INPUT...

INPUT is what `--train-data` of `align --method dpo` takes. Pairs that hold no conversation, or two
equal answers, are left out and counted.
"""

import json
import sys
from pathlib import Path

from megatron.trainer.io.atomic_write import atomic_write
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.chat.chat_files import BadRows, find_chat_files, read_units
from moe_app.chat.dialogue import Dialogue, Turns

_MOST_BAD = 1_000


def main() -> int:
    """Write a row for each answer."""
    if len(sys.argv) < 3:
        sys.stderr.write(__doc__ or "")
        return 2
    output, *inputs = sys.argv[1:]
    bad, count = BadRows(_MOST_BAD), 0
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    files = find_chat_files(inputs, flag="INPUT")
    with atomic_write(Path(output)) as file:
        for _, unit in read_units(files, "preference", ChatDataConfig(), bad):
            for dialogue, is_better in zip(unit.dialogues, (True, False), strict=True):
                file.write(_row(dialogue, is_better).encode())
                count += 1
    print(f"{output}: {count:,} judged answers; {bad.count} pairs left out")
    return 0


def _row(dialogue: Dialogue, is_better: bool) -> str:
    prompt = _messages(dialogue.turns[: dialogue.first_counted])
    answer = _messages(dialogue.turns[dialogue.first_counted :])
    row = {"prompt": prompt, "completion": answer, "label": is_better}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _messages(turns: Turns) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


if __name__ == "__main__":
    sys.exit(main())
