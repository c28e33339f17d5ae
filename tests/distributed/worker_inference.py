"""Generate and score under several layouts, in the ranks that torchrun started.

Usage: torchrun ... worker_inference.py TASK.json OUT

TASK.json: {"prompts": [[id, ...]], "rows": [[id, ...]], "stop_id": id, "new": number of tokens,
"cases": {NAME: [flag, ...]}, "asked": {NAME: {"continuations": [[[id, ...], count], ...],
"stop_text": TEXT}}}. For each case OUT/NAME.json gets what rank 0 has in the end: greedy and
sampled tokens, scores by row, the logits of the last row, the answers an evaluation gets, and the
error raised when one rank's logits are not finite.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from megatron.trainer.errors import CheckpointError
from megatron.trainer.inference.decode import Prompt
from megatron.trainer.inference.sampling import greedy_token, next_token
from megatron.trainer.inference.scoring import Continuation, compute_logits
from megatron.trainer.inference.scoring import score as score_rows
from megatron.trainer.runtime.launch import connect, environment_rank, shut_down
from megatron.trainer.runtime.log import configure_logging
from moe_app.evaluate.workers import Sampling, Workers
from moe_app.infer import generate, open_model, score


@dataclass(frozen=True, kw_only=True)
class SpelledIds:
    """Spells each token as its id, as far as looking for texts to stop at goes."""

    vocab_size: int

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{token}>" for token in ids)


def main() -> None:
    task, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    configure_logging(environment_rank())
    for name, flags in task["cases"].items():
        # The parser requires a prompt, but it is not used here.
        args = generate.make_parser().parse_args([*flags, "--prompt", ""])
        connect(open_model.parallel_config(args))
        found = run_case(args, task | task["asked"][name])
        if environment_rank() == 0:
            (out / f"{name}.json").write_text(json.dumps(found))
        shut_down(keep_world=True)


def run_case(args: Any, task: dict[str, Any]) -> dict[str, Any]:
    loaded = open_model.load_model(args, open_model.open_checkpoint(args, prog="worker"))
    rows = dict(enumerate(task["rows"]))
    share = {
        "tokens_per_batch": 24,  # several batches, several rows in some
        "data_parallel_rank": loaded.ctx.data_parallel_rank,
        "data_parallel_size": loaded.ctx.layout.data,
    }
    scores = score.gather_on_rank_0(score_rows(loaded.parallel, rows, **share))
    last = {0: task["rows"][-1]}
    logits = score.gather_on_rank_0(compute_logits(loaded.parallel, last, **share))
    return {
        "evaluation": evaluation_answers(loaded, task, args.batch_size),
        "greedy": generate_in_rounds(loaded, task, args.batch_size, is_greedy=True),
        "sampled": generate_in_rounds(loaded, task, args.batch_size, is_greedy=False),
        "scores": [scores.get(number, []) for number in rows],
        "logits": logits[0].tolist() if logits else None,
        "sequence_parallel": cast(Any, loaded.module).config.sequence_parallel,
        "non_finite_error": error_of_non_finite_rank(loaded, task, args.batch_size),
    }


def evaluation_answers(
    loaded: open_model.LoadedModel, task: dict[str, Any], size: int
) -> dict[str, Any] | None:
    """Return what rank 0 gets when it alone knows the requests."""
    workers = Workers(
        loaded,
        cast(Any, SpelledIds(vocab_size=loaded.parallel.vocab_size)),
        stop_ids={},
        tokens_per_batch=24,
        batch_size=size,
    )
    if environment_rank() != 0:
        workers.serve()
        return None
    asked = [Continuation(ids=tuple(ids), count=count) for ids, count in task["continuations"]]
    numbered = dict(enumerate(asked))
    stops = (task["stop_text"],)
    prompts = {
        number: (ids, Sampling(max_new_tokens=task["new"], stops=stops), 0)
        for number, ids in enumerate(task["prompts"])
    }
    continuations, texts = workers.continuations(numbered), workers.texts(numbered)
    generations = workers.generations(prompts)
    workers.close()
    return {
        "continuations": [continuations[number] for number in numbered],
        "texts": [texts[number] for number in numbered],
        "generations": [generations[number] for number in prompts],
    }


def error_of_non_finite_rank(
    loaded: open_model.LoadedModel, task: dict[str, Any], size: int
) -> str | None:
    """Return rank 0's error when only the last data parallel rank's logits are not finite."""
    is_last_share = loaded.ctx.data_parallel_rank == loaded.ctx.layout.data - 1
    if loaded.parallel.is_last and is_last_share:
        cast(Any, loaded.module).decoder.final_layernorm.weight.data.fill_(torch.nan)
    try:
        generate_in_rounds(loaded, task, size, is_greedy=True)
    except CheckpointError as error:
        return str(error)
    return None


def generate_in_rounds(
    loaded: open_model.LoadedModel, task: dict[str, Any], size: int, *, is_greedy: bool
) -> list[list[int]]:
    prompts = [make_prompt(ids, task["new"], i, is_greedy) for i, ids in enumerate(task["prompts"])]
    per_round = size * loaded.ctx.layout.data
    new: list[list[int]] = []
    for start in range(0, len(prompts), per_round):
        some = prompts[start : start + per_round]
        new += generate.generate_round(
            loaded, some, stop_ids={task["stop_id"]}, vocab_size=loaded.parallel.vocab_size
        )
    return new


def make_prompt(ids: list[int], count: int, seed: int, is_greedy: bool) -> Prompt:
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: torch.Tensor) -> int:
        return next_token(logits, temperature=1.0, top_p=0.9, top_k=50, generator=generator)

    return Prompt(ids=ids, sample=greedy_token if is_greedy else draw, max_new_tokens=count)


if __name__ == "__main__":
    main()
