"""Answer questions with an exported model in transformers, and compare with the answers given here.

    python examples/adapt_tiny/chat.py EXPORT ANSWERED

ANSWERED is what `tools/generate.py --greedy` wrote. Exit status: 1 where an answer differs.
"""

import json
import sys
from pathlib import Path
from typing import Any

MOST_NEW, SHOWN = 48, 3


def main() -> int:
    """Chat greedily, one question after the other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export, answered = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(export, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(export, local_files_only=True)
    rows = [json.loads(line) for line in Path(answered).read_text("utf-8").splitlines()]
    num_equal = 0
    for number, row in enumerate(rows):
        prompt: Any = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made: Any = model.generate(**prompt, do_sample=False, max_new_tokens=MOST_NEW)
        new = made[0, prompt["input_ids"].shape[1] :].tolist()
        num_equal += new == row["completion_tokens"]
        if number < SHOWN:
            print(f"Q: {row['messages'][0]['content']}")
            print(f"A: {tokenizer.decode(new, skip_special_tokens=True)}")
    print(f"transformers gives the same tokens for {num_equal} of {len(rows)} questions")
    return 0 if num_equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
