"""Computes the global batch of each step, and which step is the last of a run.

The batch may change on the way: it grows under `rampup_batch_size`, and a run may be resumed with
another one. So a run's position is a number of steps and a number of samples, and the batch of a
step is a function of the samples before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.trainer.config.parallel_layout import nearest_multiples
from megatron.trainer.config.schema import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Says how far a run is."""

    iteration: int
    """Optimizer steps done."""
    samples: int
    """Samples that these steps have taken, those of a branch's trunk included; samples that a
    rewind left out are not counted."""
    own_samples: int
    """The same without the trunk's."""
    seq_length: int
    """Tokens of a sample."""

    @property
    def tokens(self) -> int:
        """Return the tokens that the steps have taken, a branch's trunk included."""
        return self.samples * self.seq_length

    @property
    def own_tokens(self) -> int:
        """Return the same without the trunk's."""
        return self.own_samples * self.seq_length


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Computes the global batch from the samples that were taken before it.

    With a ramp-up it is Megatron-LM's: the batch begins with `start` samples and grows by
    `increment`, each time after an equal share of `ramp_samples`, up to `full`.
    """

    full: int
    """Samples in a global batch, once the ramp-up is over."""
    start: int
    """Samples in the first global batch."""
    increment: int = 0
    """Samples by which it grows; 0 where it does not."""
    ramp_samples: int = 0
    """Samples taken when the full batch is reached."""

    @property
    def _num_increments(self) -> int:
        return (self.full - self.start) // self.increment if self.increment else 0

    def size_at(self, samples: int) -> int:
        """Return the samples of the step that begins after `samples`."""
        if samples >= self.ramp_samples:
            return self.full
        return self.start + self.increment * (samples * self._num_increments // self.ramp_samples)

    def _stretches(self, samples: int) -> Iterator[tuple[int, int | None]]:
        """Yield stretches of equal batches from `samples` on: the batch, its steps; None: on."""
        while samples < self.ramp_samples:
            size = self.size_at(samples)
            number = (size - self.start) // self.increment + 1
            # The first count of samples with the next size: an exact share, rounded up.
            border = -(-number * self.ramp_samples // self._num_increments)
            steps = -(-(border - samples) // size)
            yield size, steps
            samples += steps * size
        yield self.full, None

    def samples_after(self, steps: int, samples: int = 0) -> int:
        """Return the samples taken when `steps` more steps are done after `samples`."""
        for size, length in self._stretches(samples):
            taken = steps if length is None else min(steps, length)
            samples, steps = samples + taken * size, steps - taken
            if not steps:
                break
        return samples

    def steps_until(self, wanted: int, samples: int = 0) -> int:
        """Return the steps from `samples` until at least `wanted` samples are taken."""
        steps = 0
        for size, length in self._stretches(samples):
            needed = max(0, -(-(wanted - samples) // size))
            if length is None or needed <= length:
                return steps + needed
            samples, steps = samples + length * size, steps + length
        raise AssertionError("the last stretch has no end")


def batch_plan(training: TrainingConfig) -> BatchPlan:
    """Return the global batches that a config describes; it must pass `rampup_problems`."""
    full = training.global_batch_size
    if not training.rampup_batch_size:
        return BatchPlan(full=full, start=full)
    start, increment, samples = training.rampup_batch_size
    return BatchPlan(full=full, start=start, increment=increment, ramp_samples=samples)


def is_sound(training: TrainingConfig) -> bool:
    """Return whether `batch_plan` can be made of these settings, whatever the number of ranks."""
    sizes = (training.global_batch_size, training.seq_length)
    return min(sizes) >= 1 and not rampup_problems(training, 1)


def rampup_problems(training: TrainingConfig, legal_step: int) -> list[str]:
    """List what is wrong with the ramp-up.

    Args:
        training: with a global batch of at least 1.
        legal_step: what every global batch must be a multiple of under the run's layout.
    """
    ramp, full = training.rampup_batch_size, training.global_batch_size
    if not ramp:
        return []
    told = f"rampup_batch_size ({' '.join(map(str, ramp))})"
    if len(ramp) != 3 or min(ramp) < 1:
        return [
            f"{told} must be three numbers of at least 1: the first global batch, the increment,"
            " and the samples until global_batch_size is reached; use 16 16 100000, for example"
        ]
    start, increment, _ = ramp
    if start >= full:
        return [
            f"{told} begins with a global batch of {start}, which must be below global_batch_size"
            f" ({full}); begin with less, or leave the ramp-up out"
        ]
    if (full - start) % increment:
        return [
            f"{told} grows by {increment}, which must divide global_batch_size - {start} ({full} -"
            f" {start} = {full - start}); use another increment, or begin with"
            f" {start + (full - start) % increment}"
        ]
    return [
        f"{told}: its {what} ({value}) must be a multiple of {legal_step}, what the layout divides"
        f" every global batch by (micro_batch_size x data parallel size, and x pipeline stages"
        f" where they are interleaved); use {nearest_multiples(value, legal_step)}"
        for what, value in (("first global batch", start), ("increment", increment))
        if value % legal_step
    ]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Says when a run is done: after a number of steps, or of samples whatever the batches are."""

    batches: BatchPlan
    """The batch of each step."""
    train_iters: int
    """Steps to do, if `samples` is None."""
    samples: int | None
    """The run, or the branch without its trunk, ends with the first step at or past these."""

    def is_done(self, progress: Progress) -> bool:
        """Return whether no step is left."""
        if self.samples is None:
            return progress.iteration >= self.train_iters
        return progress.own_samples >= self.samples

    def steps_left(self, progress: Progress) -> int:
        """Return the steps until the run is done."""
        if self.samples is None:
            return max(0, self.train_iters - progress.iteration)
        end = progress.samples - progress.own_samples + self.samples
        return self.batches.steps_until(end, progress.samples)

    def samples_left(self, progress: Progress) -> int:
        """Return the samples that these steps take."""
        steps = self.steps_left(progress)
        return self.batches.samples_after(steps, progress.samples) - progress.samples

    def last_iteration(self, progress: Progress) -> int:
        """Return the steps that will be done in the end; as configured, if all batches were so."""
        return progress.iteration + self.steps_left(progress)


@dataclass(frozen=True, kw_only=True)
class BatchChange:
    """Holds what a step was in the run that wrote a checkpoint, and is in the one that resumes."""

    progress: Progress
    """Progress of the checkpoint."""
    first: int
    """Steps of the trunk, for a branch."""
    saved: int | None
    """Sequences in the checkpoint's next global batch; None if it does not say."""
    now: int
    """Sequences in this run's."""

    def tokens_of_step(self, size: int | None) -> int | None:
        """Return the tokens of every step so far, None if not all had a batch of `size`."""
        steps = self.progress.iteration - self.first
        if size is None or steps * size != self.progress.own_samples:
            return None
        return size * self.progress.seq_length

    def describe(self, plan: RunPlan) -> str | None:
        """Say that the batch is another one now, and what that means for the rest of the run."""
        if self.saved is None or self.saved == self.now:
            return None
        length = self.progress.seq_length
        steps, samples = plan.steps_left(self.progress), plan.samples_left(self.progress)
        if plan.samples is None:
            unit, before = "steps", f"{steps * self.saved * length:,} tokens"
        else:
            unit, before = "tokens", f"{-(-samples // self.saved):,} steps"
        return (
            f"the global batch is {self.now} sequences from here on, it was {self.saved}; the run"
            f" has its length in {unit}: {steps:,} steps = {samples * length:,} tokens are left"
            f" (with the batch as it was: {before})"
        )
