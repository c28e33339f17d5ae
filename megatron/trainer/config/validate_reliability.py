"""Checks the settings of checkpoints, early exits, bad steps and profiling."""

from megatron.trainer.config.schema import CheckpointConfig, ReliabilityConfig, RunConfig


def reliability_problems(reliability: ReliabilityConfig, checkpoint: CheckpointConfig) -> list[str]:
    """Find settings of reliability that cannot work, one message each."""
    above_zero = {
        "exit_duration_in_mins": reliability.exit_duration_in_mins,
        "spike_sigma": reliability.spike_sigma,
        "preflight_timeout": reliability.preflight_timeout,
    }
    found = [
        f"{name} ({value:g}) must be above 0; use a positive number"
        for name, value in above_zero.items()
        if value is not None and value <= 0
    ]
    code = reliability.requeue_exit_code
    if not 0 <= code <= 255:
        found.append(
            f"requeue_exit_code ({code}) must be an exit status; use a number from 0 to 255"
        )
    if reliability.rewind_on_spike and checkpoint.save is None:
        found.append(
            "rewind_on_spike (True) needs save (None), the directory of the checkpoints to"
            " rewind to; set --save DIR, or drop --rewind-on-spike"
        )
    return found


def checkpoint_problems(checkpoint: CheckpointConfig) -> list[str]:
    """Find settings of checkpoints that contradict each other, one message each."""
    found = []
    if checkpoint.keep_every is not None and checkpoint.keep_last is None:
        found.append(
            f"keep_every ({checkpoint.keep_every}) changes nothing without keep_last (None), which"
            " keeps all checkpoints; set --keep-last N, or drop --keep-every"
        )
    if checkpoint.save_interval > 0 and checkpoint.save is None:
        found.append(
            f"save_interval ({checkpoint.save_interval}) needs save (None), the directory to write"
            " to; set --save DIR, or drop --save-interval"
        )
    if checkpoint.load is None:
        if checkpoint.ckpt_step is not None:
            found.append(
                f"ckpt_step ({checkpoint.ckpt_step}) needs load (None), the directory to read"
                " from; set --load DIR, or drop --ckpt-step"
            )
        if checkpoint.finetune:
            found.append(
                "finetune (True) needs load (None), the directory whose weights to take; set"
                " --load DIR, or drop --finetune"
            )
    return found


def profiling_problems(cfg: RunConfig, world_size: int) -> list[str]:
    """Find settings of profiling that cannot work, one message each; none if it is off."""
    profiling, train_iters = cfg.profiling, cfg.training.train_iters
    if not profiling.profile:
        return []
    start, end = profiling.profile_step_start, profiling.profile_step_end
    found = []
    if not 0 <= start < end:
        found.append(
            f"profile_step_start ({start}) must be at least 0 and below profile_step_end ({end});"
            f" use --profile-step-end {max(start, 0) + 1} or more"
        )
    elif start >= train_iters:
        found.append(
            f"profile_step_start ({start}) must be below train_iters ({train_iters}), or nothing is"
            " profiled; use an earlier step"
        )
    outside = [rank for rank in profiling.profile_ranks if not 0 <= rank < world_size]
    if outside or not profiling.profile_ranks:
        found.append(
            f"profile_ranks ({', '.join(map(str, profiling.profile_ranks))}) must name ranks of"
            f" this run, 0 to {world_size - 1}"
        )
    if cfg.checkpoint.save is None:
        found.append(
            "profile (True) needs save (None), the directory to write to; set --save DIR, or drop"
            " --profile"
        )
    return found
