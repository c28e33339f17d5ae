"""Dispatches the commands of the project: `megatron-moe NAME` and `tools/NAME.py`.

A command imports its module when it is called, so that `megatron-moe watch` needs no torch and
`pretrain` handles signals before the imports that take seconds.
"""

import sys
from importlib.metadata import version

from megatron.trainer.runtime.postponed_compile import postponed_compile
from megatron.trainer.runtime.upstream_warnings import hide_upstream_warnings
from moe_app.command_entry import Argv, Command
from moe_app.command_line import prints_any_text


@prints_any_text
def pretrain(argv: Argv = None) -> int:
    """Run `moe_app.pretrain`."""
    from moe_app.pretrain import start

    return start(argv)


@prints_any_text
@hide_upstream_warnings()
def finetune(argv: Argv = None) -> int:
    """Run `moe_app.finetune`."""
    from moe_app.finetune import start

    return start(argv)


@prints_any_text
@hide_upstream_warnings()
def align(argv: Argv = None) -> int:
    """Run `moe_app.align`."""
    from moe_app.align import start

    return start(argv)


@prints_any_text
def build_corpus(argv: Argv = None) -> int:
    """Run `moe_app.data.build_corpus`."""
    from moe_app.data.build_corpus import main

    return main(argv)


@prints_any_text
def train_tokenizer(argv: Argv = None) -> int:
    """Run `moe_app.data.train_tokenizer`."""
    from moe_app.data.train_tokenizer import main

    return main(argv)


@prints_any_text
def preprocess_data(argv: Argv = None) -> int:
    """Run `moe_app.data.preprocess_data`."""
    from moe_app.data.preprocess_data import main

    return main(argv)


@prints_any_text
def filter_data(argv: Argv = None) -> int:
    """Run `moe_app.filter.filter_data`."""
    from moe_app.filter.filter_data import main

    return main(argv)


@prints_any_text
def report_data(argv: Argv = None) -> int:
    """Run `moe_app.filter.report_data`."""
    from moe_app.filter.report_data import main

    return main(argv)


@prints_any_text
def show_data(argv: Argv = None) -> int:
    """Run `moe_app.chat.show_data`."""
    from moe_app.chat.show_data import main

    return main(argv)


@prints_any_text
@hide_upstream_warnings()
@postponed_compile()
def generate(argv: Argv = None) -> int:
    """Run `moe_app.infer.generate`."""
    from moe_app.infer.generate import main

    return main(argv)


@prints_any_text
@hide_upstream_warnings()
@postponed_compile()
def score(argv: Argv = None) -> int:
    """Run `moe_app.infer.score`."""
    from moe_app.infer.score import main

    return main(argv)


@prints_any_text
@hide_upstream_warnings()
@postponed_compile()
def evaluate(argv: Argv = None) -> int:
    """Run `moe_app.evaluate.evaluation`."""
    from moe_app.evaluate.evaluation import main

    return main(argv)


@prints_any_text
@hide_upstream_warnings()
def fetch_tasks(argv: Argv = None) -> int:
    """Run `moe_app.evaluate.fetch_tasks`."""
    from moe_app.evaluate.fetch_tasks import main

    return main(argv)


@prints_any_text
def report_eval(argv: Argv = None) -> int:
    """Run `moe_app.evaluate.report_eval`."""
    from moe_app.evaluate.report_eval import main

    return main(argv)


@prints_any_text
@hide_upstream_warnings()
@postponed_compile()
def convert_checkpoint(argv: Argv = None) -> int:
    """Run `moe_app.convert.convert_checkpoint`."""
    from moe_app.convert.convert_checkpoint import main

    return main(argv)


@prints_any_text
@hide_upstream_warnings()
@postponed_compile()
def upcycle(argv: Argv = None) -> int:
    """Run `moe_app.upcycle.upcycle_command`."""
    from moe_app.upcycle.upcycle_command import main

    return main(argv)


@prints_any_text
@hide_upstream_warnings()
@postponed_compile()
def analyze_routing(argv: Argv = None) -> int:
    """Run `moe_app.analyze.analyze_routing`."""
    from moe_app.analyze.analyze_routing import main

    return main(argv)


@prints_any_text
@hide_upstream_warnings()
@postponed_compile()
def doctor(argv: Argv = None) -> int:
    """Run `moe_app.doctor.diagnose`."""
    from moe_app.doctor.diagnose import main

    return main(argv)


@prints_any_text
@hide_upstream_warnings()
@postponed_compile()
def plan(argv: Argv = None) -> int:
    """Run `moe_app.planner.plan`."""
    from moe_app.planner.plan import main

    return main(argv)


@prints_any_text
@hide_upstream_warnings()
@postponed_compile()
def ablate(argv: Argv = None) -> int:
    """Run `moe_app.ablate.ablate_command`."""
    from moe_app.ablate.ablate_command import main

    return main(argv)


@prints_any_text
@hide_upstream_warnings()
def submit(argv: Argv = None) -> int:
    """Run `moe_app.submission.submit`."""
    from moe_app.submission.submit import main

    return main(argv)


@prints_any_text
def requeue(argv: Argv = None) -> int:
    """Run `moe_app.slurm.requeue`."""
    from moe_app.command_line import program
    from moe_app.slurm.requeue import main

    return main(None if argv is None else list(argv), prog=program("requeue"))


@prints_any_text
def watch(argv: Argv = None) -> int:
    """Run `moe_app.view.watch`."""
    from moe_app.view.watch import main

    return main(argv)


@prints_any_text
@hide_upstream_warnings()
def report(argv: Argv = None) -> int:
    """Run `moe_app.view.report`."""
    from moe_app.view.report import main

    return main(argv)


@prints_any_text
def report_run(argv: Argv = None) -> int:
    """Run `moe_app.view.report_run`."""
    from moe_app.view.report_run import main

    return main(argv)


GROUPS: dict[str, tuple[Command, ...]] = {
    "data": (
        Command(
            name="build-corpus",
            summary="make a corpus of this Python installation's text",
            run=build_corpus,
        ),
        Command(
            name="filter",
            summary="filter and deduplicate documents",
            run=filter_data,
        ),
        Command(
            name="train-tokenizer",
            summary="train a SentencePiece or byte-level BPE tokenizer",
            run=train_tokenizer,
        ),
        Command(
            name="preprocess",
            summary="tokenize JSON lines into Megatron's token files",
            run=preprocess_data,
        ),
        Command(
            name="report-data",
            summary="report what data hold: lengths, duplicates, languages",
            run=report_data,
        ),
        Command(
            name="show-data",
            summary="show conversations as a model sees them, and what counts",
            run=show_data,
        ),
    ),
    "training": (
        Command(
            name="pretrain",
            summary="pretrain or anneal a model",
            run=pretrain,
        ),
        Command(name="finetune", summary="fine-tune a model on conversations", run=finetune),
        Command(name="align", summary="align a model with preferences", run=align),
        Command(
            name="ablate",
            summary="train variants of a recipe and compare them with findings",
            run=ablate,
        ),
        Command(
            name="plan",
            summary="list the layouts that fit a number of GPUs",
            run=plan,
        ),
        Command(
            name="doctor",
            summary="check what this machine can do for a run",
            run=doctor,
        ),
    ),
    "cluster": (
        Command(
            name="submit",
            summary="submit a recipe to SLURM and follow the job",
            run=submit,
        ),
        Command(
            name="requeue",
            summary="decide whether a job is requeued",
            run=requeue,
        ),
    ),
    "runs": (
        Command(name="watch", summary="watch runs in a terminal", run=watch),
        Command(
            name="report",
            summary="summarize a run; compare its losses with the unigram entropy",
            run=report,
        ),
        Command(
            name="report-run",
            summary="write one HTML page on one or several runs",
            run=report_run,
        ),
    ),
    "models": (
        Command(name="generate", summary="continue prompts with a model", run=generate),
        Command(
            name="score",
            summary="compute the log-probability of every token of a file",
            run=score,
        ),
        Command(name="evaluate", summary="evaluate a model on tasks", run=evaluate),
        Command(
            name="fetch-tasks",
            summary="copy the data of tasks, to evaluate without a network",
            run=fetch_tasks,
        ),
        Command(
            name="report-eval",
            summary="set evaluations beside each other and the papers' figures",
            run=report_eval,
        ),
        Command(
            name="analyze",
            summary="analyse what a model's routers learned",
            run=analyze_routing,
        ),
        Command(
            name="convert",
            summary="import from and export to Hugging Face",
            run=convert_checkpoint,
        ),
        Command(
            name="upcycle",
            summary="make a mixture of experts of a dense model",
            run=upcycle,
        ),
    ),
}
COMMANDS = {command.name: command for group in GROUPS.values() for command in group}


def help_text() -> str:
    """Return the list of commands, by group."""
    width = max(map(len, COMMANDS))
    lines = ["usage: megatron-moe COMMAND [ARGUMENTS]", ""]
    for title, commands in GROUPS.items():
        lines += [f"{title}:", *(f"  {each.name:{width}}  {each.summary}" for each in commands), ""]
    lines.append("megatron-moe COMMAND --help explains a command; many ranks:")
    lines.append("  torchrun --nproc-per-node 8 --no-python megatron-moe pretrain ...")
    return "\n".join(lines)


@prints_any_text
def main(argv: Argv = None) -> int:
    """Run the command that the first argument names; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"megatron-moe {version('megatron-moe')}")
        return 0
    if name not in COMMANDS:
        from megatron.trainer.config.near_names import did_you_mean

        hint = did_you_mean(name, COMMANDS)
        print(
            f"error: megatron-moe has no command {name!r}{hint}; megatron-moe --help lists them",
            file=sys.stderr,
        )
        return 2
    return COMMANDS[name].run(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
