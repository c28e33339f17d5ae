"""Hands the stages of a plan to the executor that the command line names."""

import argparse

from megatron.trainer.errors import ConfigError
from moe_app.filter.filter_plan import FilterPlan, read_plan
from moe_app.filter.pipeline.cluster_executors import (
    parse_slurm,
    run_on_ray,
    run_share,
    submit_stages,
)
from moe_app.filter.pipeline.document_filters import check_tokenizer
from moe_app.filter.pipeline.executors import run_locally
from moe_app.filter.pipeline.stages import build_stages
from moe_app.filter.work_folder import WorkFolder


def run_plan(plan: FilterPlan, folder: WorkFolder, args: argparse.Namespace) -> bool:
    """Run or submit what is missing of a plan; return whether the corpus is complete now.

    Raises:
        UserError: As the executors and the steps.
    """
    if plan.tokenizer is not None:
        check_tokenizer(plan.tokenizer)
    stages = build_stages(plan, folder)
    if args.executor == "slurm":
        options = parse_slurm(args.slurm)
        submitted = submit_stages(
            stages, folder, jobs=args.tasks, workers=args.workers, options=options
        )
        for name, job in submitted.items():
            print(f"{name}: job {job}")
        if submitted:
            print(
                f"{folder.summary} is there when the last has ended; started again, this command"
                " submits what is missing"
            )
        return not submitted
    if args.executor == "ray":
        run_on_ray(stages, folder, jobs=args.tasks, workers=args.workers)
        return True
    workers = args.workers or 1
    run_locally(stages, folder, workers=min(workers, args.tasks or workers))
    return True


def run_array_task(folder: WorkFolder, args: argparse.Namespace) -> None:
    """Run the share of one stage that an element of a SLURM array has.

    Raises:
        ConfigError: There is no such stage.
        DataError: A later submission does this work.
        UserError: As the steps.
    """
    name, plan = args.run_stage, read_plan(folder.output)
    stages = {stage.name: stage for stage in build_stages(plan, folder)} if plan else {}
    if name not in stages:
        raise ConfigError(
            f"--run-stage {name}: {folder.output} has no such stage; it has"
            f" {', '.join(stages) or 'none'}; the script of --executor slurm names the right one"
        )
    run_share(stages[name], folder, submission=args.submission, share=args.share, jobs=args.tasks)
