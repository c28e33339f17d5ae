"""Run lm-evaluation-harness's own command line with `--model megatron_moe`, alone or on many ranks.

    python -m moe_app.evaluate.lm_eval_cli --model megatron_moe --model_args load=RUN --tasks piqa
    torchrun --nproc-per-node 2 -m moe_app.evaluate.lm_eval_cli --model megatron_moe \
        --model_args load=RUN,tensor_model_parallel_size=2 --tasks piqa --output_path EVAL

The harness has no entry points for models of others; this registers one, whose arguments are called
as those of the harness's `megatron_lm`, and hands all else to the harness.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import ConfigError
from megatron.trainer.runtime.launch import environment_rank, run_main
from megatron.trainer.runtime.log import configure_logging
from moe_app.evaluate import evaluation
from moe_app.evaluate.answers import AnswerFile
from moe_app.evaluate.suites import Suite
from moe_app.evaluate.workers import Workers
from moe_app.infer import open_model

MODEL = "megatron_moe"
FLAGS = {
    "load": "--load",
    "ckpt_step": "--ckpt-step",
    "tokenizer_type": "--tokenizer-type",
    "tokenizer_model": "--tokenizer-model",
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "expert_tensor_parallel_size": "--expert-tensor-parallel-size",
    "seq_length": "--max-length",
    "micro_batch_size": "--batch-size",
    "max_gen_toks": "--max-gen-toks",
    "prefix_token_id": "--prefix-token-id",
    "device": "--device",
}
"""Flags of `evaluate` by the names that --model_args takes."""
SWITCHES = {"bf16": "--bf16", "fp32": "--fp32"}


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as `argv` says; return the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    return run_main(lambda: run(given))


def run(argv: Sequence[str]) -> None:
    """Load the model on all ranks, and let the harness's command line ask it on rank 0.

    Raises:
        UserError: an argument or the checkpoint is invalid.
    """
    configure_logging(environment_rank())
    evaluation.check_harness()
    from lm_eval._cli import HarnessCLI

    # The harness reads the process's arguments.
    sys.argv = ["lm-eval", *argv]
    cli = HarnessCLI()
    asked = cli.parse_args()
    if getattr(asked, "model", None) != MODEL:
        raise ConfigError(
            f"--model is {getattr(asked, 'model', None)}; this command runs {MODEL} alone; give"
            f" --model {MODEL}, or start the others with lm-eval"
        )
    with tempfile.TemporaryDirectory() as folder:
        args = model_flags(asked.model_args or {}, Path(folder))
        with open_model.joined_ranks(args):
            _run(cli, asked, args)


def model_flags(given: Mapping[str, Any], output: Path) -> argparse.Namespace:
    """Return the flags of `evaluate` that arguments of the model stand for.

    Args:
        given: the arguments by name.
        output: for answers.

    Raises:
        ConfigError: one is not known, or there is no `load`.
    """
    known = {*FLAGS, *SWITCHES}
    unknown = sorted(set(given) - known)
    if unknown or "load" not in given:
        what = f"has {', '.join(unknown)}" if unknown else "has no load"
        raise ConfigError(
            f"--model_args {what}; known are {', '.join(sorted(known))}, and load must be there;"
            " name a run's directory with load=DIR"
        )
    flags = [part for key in FLAGS if key in given for part in (FLAGS[key], str(given[key]))]
    flags += [flag for key, flag in SWITCHES.items() if given.get(key)]
    parser = evaluation.make_parser()
    return open_model.parse(parser, [*flags, "--tasks", MODEL, "--output", str(output)])


def _run(cli: Any, asked: argparse.Namespace, args: argparse.Namespace) -> None:
    """Load, and evaluate on rank 0 while the others serve."""
    opened = open_model.open_checkpoint(args, prog="lm_eval_cli")

    def evaluate(tokenizer: Tokenizer, workers: Workers, answers: AnswerFile) -> None:
        _register(evaluation.harness_model(args, opened, tokenizer, workers, answers))
        cli.execute(asked)

    evaluation.on_workers(args, Suite(tasks=()), opened, evaluate)


def _register(model: Any) -> None:
    """Let the harness find the loaded model by its name."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import model_registry

    class Loaded(LM):
        """Stands for the class of the model, of which there is one already."""

        loaded: Any = None

        @classmethod
        def create_from_arg_obj(cls, *_: Any, **__: Any) -> Any:
            return cls.loaded

        create_from_arg_string = create_from_arg_obj

    registered = model_registry.get(MODEL, None)
    if registered is None:
        registered = model_registry.register(MODEL)(Loaded)
    registered.loaded = model


if __name__ == "__main__":
    sys.exit(main())
