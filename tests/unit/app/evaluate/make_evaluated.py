"""Makes models and tasks to evaluate, and evaluates them."""

import json
from pathlib import Path
from typing import Any

import torch

from moe_app.convert import convert_checkpoint
from moe_app.evaluate import evaluation as command
from tests.distributed.convert_models import make_hf
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer

END = "<|endoftext|>"
ROWS = 289
"""Of the embedding: as many as the tokenizer has ids, so that none can be drawn without a text."""
LENGTH = 40
TASKS = ["choices", "letters", "texts", "words"]
QUESTIONS = [
    ("the quick brown", [" fox", " lazy dog", " the", " jumps over the lazy"], 0),
    ("", ["over the", "dog", "fox", "lazy the"], 1),
    ("the lazy dog jumps ", ["over", "é", "日本", "\n"], 2),
    ("fox " * 60, ["dog", "over the", "fox", "."], 3),  # longer than the model
]


def write_tasks(folder: Path) -> None:
    docs = [{"q": q, "choices": choices, "gold": gold} for q, choices, gold in QUESTIONS]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    accuracy = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ]
    tasks: dict[str, dict[str, Any]] = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": accuracy,
        },
        "letters": {
            "output_type": "multiple_choice",
            "doc_to_choice": ["A", "B", "C", "D"],
            "doc_to_target": "gold",
            "metric_list": accuracy[:1],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{q}}{{choices[1]}}",
            "metric_list": [
                {
                    "metric": "bits_per_byte",
                    "aggregation": "bits_per_byte",
                    "higher_is_better": False,
                }
            ],
        },
        "words": {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}dog",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["zz", "e"], "max_gen_toks": 9, "do_sample": False},
            "metric_list": [
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
            ],
        },
    }
    for name, task in tasks.items():
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))


def write_model(where: Path, family: str) -> None:
    """Write a random model, as Hugging Face has it and as a run."""
    hf, _ = make_hf(where / family, family, "fused", dtype=torch.float32, **model_changes())
    make_hf_tokenizer(hf, [END], tokenizer_config={"eos_token": END, "bos_token": END})
    run = where / f"{family}-run"
    assert convert_checkpoint.main(["import", "--hf", str(hf), "--save", str(run)]) == 0


def model_changes() -> dict[str, Any]:
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return {"vocab_size": ROWS, "max_position_embeddings": LENGTH, "torch_dtype": "float32", **ids}


def arguments(folder: Path, family: str, output: Path, *more: str, tasks: str = "") -> list[str]:
    return [
        *("--load", str(folder / f"{family}-run"), "--include-path", str(folder)),
        *("--tasks", tasks or ",".join(TASKS), "--output", str(output), "--fp32"),
        *("--max-length", str(LENGTH), "--bootstrap-iters", "0", *more),
    ]


def evaluate(folder: Path, family: str, output: Path, *more: str, tasks: str = "") -> int:
    return command.main(arguments(folder, family, output, *more, tasks=tasks))
