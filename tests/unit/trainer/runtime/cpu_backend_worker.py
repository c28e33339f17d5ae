"""Evaluates what test_cpu_backend.py asks, in a redirected process or an untouched one.

Usage: cpu_backend_worker.py QUESTIONS

QUESTIONS: {"is_redirected": ..., "stories": {name: code that fills `found`}, "effects": {name:
expression}, "factories": {name: expression of a tensor}}, as JSON. Prints the answers by name.
"""

import json
import operator
import sys
from typing import Any

import torch

from megatron.trainer.runtime import cpu_backend


def answer(expression: str) -> Any:
    try:
        return eval(expression)
    except Exception as error:
        return type(error).__name__


def main() -> None:
    questions = json.loads(sys.argv[1])
    # Or what the redirection owes to the meta device would not be seen.
    assert torch.utils._device._device_constructors.cache_info().currsize == 0
    if questions["is_redirected"]:
        cpu_backend.redirect_cuda()
    answers: dict[str, Any] = {}
    for name, code in questions["stories"].items():
        answers[name] = {}
        names = {"torch": torch, "operator": operator, "cpu_backend": cpu_backend}
        exec(code, {**names, "found": answers[name]})
    for name, expression in questions["effects"].items():
        answers[name] = answer(expression)
    for name, expression in questions["factories"].items():
        answers["factory " + name] = answer(f"str(({expression}).device)")
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
