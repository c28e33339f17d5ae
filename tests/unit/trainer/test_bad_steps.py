"""Steps that are skipped or undone, against the same steps put together by hand."""

import errno
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.trainer.data.batch import Batch
from megatron.trainer.errors import StepRefusedError
from megatron.trainer.hooks.base import Hook
from megatron.trainer.hooks.journal import open_journal
from megatron.trainer.loop import Upkeep, train
from megatron.trainer.objective import NEXT_TOKEN, TokenObjective
from megatron.trainer.records.record_file import Record, RecordError, append_record, read_records
from megatron.trainer.resume import checkpoint_writer, resume, rewind
from megatron.trainer.state import TrainState
from megatron.trainer.step import train_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(all_gather_into|reduce_scatter)_tensor.:FutureWarning"),
]

BATCH = 8
StateMaker = Callable[..., TrainState]


@pytest.fixture
def make_state(make_state: StateMaker) -> StateMaker:
    """Of one layer."""
    return partial(make_state, num_layers=1)


class Poisoned(TokenObjective):
    """An objective that makes the losses of some samples infinite, or large.

    Args:
        state: whose stream tells which samples are being read.
        samples: numbers of the bad ones.
        factor: what their losses are multiplied by.
    """

    def __init__(self, state: TrainState, samples: range, factor: float = math.inf) -> None:
        super().__init__()
        self.state, self.samples, self.factor = state, samples, factor

    def forward(self, batches: Iterator[Batch], model: torch.nn.Module) -> Any:
        batch = next(batches)
        read = self.state.train_data.consumed_samples - BATCH
        if read in self.samples and model.training:
            batch = replace(batch, loss_mask=batch.loss_mask * self.factor)
            batch = replace(batch, loss_tokens=torch.tensor(BATCH * 16.0 / 4))
        output, loss = super().forward(iter([batch]), model)

        def counted(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            mean, report = loss(losses)
            return mean, {"lm_loss": torch.stack((report["lm_loss"][0], torch.tensor(32.0)))}

        return output, counted


class FullDisk(Hook):
    """Cannot write, and cannot end either."""

    def on_log(self, record: Record) -> None:
        append_record(Path("/dev/full"), record)

    def on_end(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


class Ends(FullDisk):
    def on_log(self, record: Record) -> None:
        """Writes nothing."""


class Records(Hook):
    def __init__(self) -> None:
        self.steps: list[Record] = []

    def on_log(self, record: Record) -> None:
        self.steps.append(record)

    def on_rewind(self, iteration: int) -> None:
        self.steps = [record for record in self.steps if record["iteration"] <= iteration]


def weights(state: TrainState) -> dict[str, Tensor]:
    """Parameters, and biases of experts."""
    (model,) = state.modules
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named}


def moments(state: TrainState) -> list[Tensor]:
    return [
        value.clone()
        for inner in state.optimizer.chained_optimizers
        for entry in inner.optimizer.state.values()
        for value in (entry["exp_avg"], entry["exp_avg_sq"])
    ]


def assert_same(first: TrainState, second: TrainState) -> None:
    for name, weight in weights(first).items():
        assert torch.equal(weight, weights(second)[name]), name
    for a, b in zip(moments(first), moments(second), strict=True):
        assert torch.equal(a, b)


BIASED = {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.02}
PRECISIONS: list[dict[str, Any]] = [{}, {"bf16": True, "use_distributed_optimizer": True, **BIASED}]


@pytest.mark.parametrize("precision", PRECISIONS, ids=["fp32", "bf16"])
@pytest.mark.parametrize("clip_grad", [0.05, 50.0, 0.0])
def test_update_is_bitwise_that_of_megatron_cores_own_step(
    precision: dict[str, Any],
    clip_grad: float,
    make_state: StateMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that is clipped is that of gradients divided beforehand, which it copies into weights."""

    def core_step(state: TrainState, _norm: float | None) -> tuple[float, str | None]:
        for inner in state.optimizer.chained_optimizers:
            vars(inner).pop("_copy_main_params_to_model_params", None)
        if clip_grad != 0.05:
            _, norm, _ = state.optimizer.step()
            return float(norm), None
        norm = float(state.optimizer.get_grad_norm())
        for inner in state.optimizer.chained_optimizers:
            for p in inner.get_parameters():
                p.grad /= torch.tensor((norm + 1e-6) / clip_grad)
        return norm, None if state.optimizer.step_with_ready_grads() else "refused"

    ours, truth = (make_state(clip_grad=clip_grad, **precision) for _ in range(2))
    norms = [train_step(ours, NEXT_TOKEN).grad_norm for _ in range(3)]
    monkeypatch.setattr("megatron.trainer.step._update", core_step)
    assert norms == [train_step(truth, NEXT_TOKEN).grad_norm for _ in range(3)]
    assert 0.05 < min(norms) and max(norms) < 50.0
    assert_same(ours, truth)


@pytest.mark.parametrize("precision", PRECISIONS, ids=["fp32", "bf16"])
def test_skipped_step_counts_but_changes_nothing(
    precision: dict[str, Any], make_state: StateMaker
) -> None:
    """As if its samples had been left out, at the same place of the schedule."""
    flags_ = {"train_iters": 5, "max_skipped": 1, "log_interval": 2, **precision}
    state, records = make_state(**flags_), Records()
    assert train(state, Poisoned(state, range(16, 24)), hooks=[records]) is None
    truth = make_state(**flags_)
    moved: list[str] = []
    for step in range(5):
        if step == 2:
            truth.train_data.skip({"mock": BATCH})
            truth.iteration += 1
        else:
            train_step(truth, NEXT_TOKEN)
        if step == 0:
            biases = truth.modules[0].named_buffers()
            moved = [name for name, bias in biases if bias.dtype == torch.float32 and bias.any()]
    assert_same(state, truth)
    assert state.iteration == 5
    assert moved == [name for name in weights(truth) if "expert_bias" in name]
    # Told once, with the records of steps 3 and 4.
    assert [record["skipped"] for record in records.steps] == [0, 1]


def test_gradient_norm_that_is_not_finite_is_skipped_before_anything_changes(
    make_state: StateMaker,
) -> None:
    state = make_state(max_skipped=1, **BIASED)
    train_step(state, NEXT_TOKEN)
    before, moments_before = weights(state), moments(state)
    parameter = dict(state.modules[0].named_parameters())["decoder.final_layernorm.weight"]
    hook = parameter.register_hook(lambda grad: grad * math.nan)
    result = train_step(state, NEXT_TOKEN)
    hook.remove()
    assert result.skipped is not None
    assert result.skipped.startswith("gradient norm is nan at iteration 2 (loss 4.")
    assert math.isnan(result.grad_norm)
    for name, weight in weights(state).items():
        assert torch.equal(weight, before[name]), name
    assert all(torch.equal(a, b) for a, b in zip(moments(state), moments_before, strict=True))
    assert train_step(state, NEXT_TOKEN).skipped is None
    assert state.iteration == 3


def test_spike_is_skipped_and_leaves_the_history_alone(make_state: StateMaker) -> None:
    state = make_state(max_skipped=1, spike_sigma=6, spike_window=8)
    objective = Poisoned(state, range(72, 80), factor=50.0)
    results = [train_step(state, objective) for _ in range(11)]
    skipped = [index for index, result in enumerate(results) if result.skipped is not None]
    assert skipped == [9]
    assert results[9].skipped is not None
    assert "mean and deviation of the last 8 steps at iteration 10, in global samples 72 to 79" in (
        results[9].skipped
    )
    history = state.guard.state_dict()["losses"]
    assert history == [results[i].loss for i in (2, 3, 4, 5, 6, 7, 8, 10)]


def test_one_more_than_may_be_skipped_ends_the_run(make_state: StateMaker) -> None:
    state = make_state(max_skipped=2, train_iters=9)
    message = (
        r"^loss is inf at iteration 4, in global samples 24 to 25, .* after 2 skipped in a row"
        r" \(--max-skipped\); the weights were not updated"
    )
    with pytest.raises(StepRefusedError, match=message):
        train(state, Poisoned(state, range(8, 64)), hooks=[])
    assert state.iteration == 3


def run(state: TrainState, directory: Path, bad: range) -> list[Record]:
    """Train as pretrain.py does, with some samples poisoned."""
    journal = open_journal(str(directory), rank=0, train_iters=state.cfg.training.train_iters)
    records = Records()
    upkeep = Upkeep(save=checkpoint_writer(state), rewind=rewind)
    with journal.recording_errors():
        train(state, Poisoned(state, bad), hooks=[journal, records], upkeep=upkeep)
    return records.steps


def losses(records: list[Record]) -> list[tuple[int, float, int]]:
    return [(r["iteration"], r["lm_loss"], r["consumed_samples"]) for r in records]


@pytest.mark.parametrize("precision", PRECISIONS, ids=["fp32", "bf16"])
def test_rewind_is_the_run_from_the_checkpoint_without_those_samples(
    precision: dict[str, Any], make_state: StateMaker, tmp_path: Path
) -> None:
    settings = {
        "train_iters": 8,
        "save_interval": 2,
        "max_skipped": 1,
        "rewind_on_spike": True,
        "spike_sigma": 50,
        **precision,
    }
    directory = tmp_path / "run"
    # Steps 6 and 7: the first is skipped, the second is one too many, after the save of step 6.
    state = make_state(**settings, save=directory)
    taken = run(state, directory, range(40, 56))

    truth = make_state(**settings, save=tmp_path / "other", load=directory, ckpt_step=6)
    resume(truth, recipe_model(truth))
    assert (truth.iteration, truth.guard.skipped_in_row) == (6, 1)
    truth.train_data.skip({"mock": BATCH})
    expected = run(truth, tmp_path / "other", range(0))

    assert losses(taken)[6:] == losses(expected) and len(expected) == 2
    assert [record["iteration"] for record in taken] == list(range(1, 9))
    assert taken[-1]["consumed_samples"] == 9 * BATCH
    assert_same(state, truth)
    names = [event["event"] for event in read_records(directory / "events.jsonl")]
    assert names == ["save", "save", "skip", "save", "rewind", "save"]
    event = list(read_records(directory / "events.jsonl"))[4]
    assert (event["iteration"], event["rewound_from"]) == (6, 6)
    saved = json.loads((directory / "iter_0000008" / "run.json").read_text())
    assert saved["guard"]["rewinds"] == [[6, 1]]
    assert saved["data"]["phases"][0]["left_out"] == [BATCH]
    assert saved["data"]["consumed_samples"] == 9 * BATCH


def recipe_model(state: TrainState) -> Any:
    return state.cfg.model  # type: ignore[attr-defined]


def test_resume_after_a_rewind_skips_the_samples_left_out(
    make_state: StateMaker, tmp_path: Path
) -> None:
    settings = {
        "save_interval": 2,
        "rewind_on_spike": True,
        "lr_decay_iters": 8,
        "save": tmp_path / "run",
    }
    whole = make_state(**settings, train_iters=8)
    taken = run(whole, tmp_path / "run", range(24, 32))
    assert taken[-1]["consumed_samples"] == 10 * BATCH
    again = make_state(**settings, train_iters=8, load=tmp_path / "run", ckpt_step=6)
    resume(again, recipe_model(again))
    assert losses(run(again, tmp_path / "run", range(0))) == losses(taken)[6:]
    assert_same(whole, again)


def test_rewinds_to_one_checkpoint_are_limited(make_state: StateMaker, tmp_path: Path) -> None:
    state = make_state(
        train_iters=8, save_interval=2, rewind_on_spike=True, max_rewinds=2, save=tmp_path / "run"
    )
    with pytest.raises(
        StepRefusedError, match=r"^loss is inf at iteration 3, in global samples 32"
    ):
        run(state, tmp_path / "run", range(16, 1000))
    events = list(read_records(tmp_path / "run" / "events.jsonl"))
    assert [event["event"] for event in events] == ["save", "rewind", "rewind", "end"]
    assert json.loads((tmp_path / "run" / "ended.json").read_text())["reason"] == "error"


def test_rewind_without_a_checkpoint_ends_the_run(make_state: StateMaker, tmp_path: Path) -> None:
    state = make_state(train_iters=8, rewind_on_spike=True, save=tmp_path / "run")
    with pytest.raises(StepRefusedError, match=r"^loss is inf at iteration 2"):
        run(state, tmp_path / "run", range(8, 16))


def test_rewind_skips_checkpoints_of_a_run_that_was_rolled_back(
    make_state: StateMaker, tmp_path: Path
) -> None:
    settings = {
        "train_iters": 8,
        "save_interval": 2,
        "rewind_on_spike": True,
        "save": tmp_path / "run",
    }
    run(make_state(**settings), tmp_path / "run", range(0))
    state = make_state(**settings, load=tmp_path / "run", ckpt_step=4)
    resume(state, recipe_model(state))
    # The tracker names iteration 8 as yet.
    taken = run(state, tmp_path / "run", range(32, 40))
    assert [record["iteration"] for record in taken] == [5, 6, 7, 8]
    assert taken[-1]["consumed_samples"] == 9 * BATCH
    events = list(read_records(tmp_path / "run" / "events.jsonl"))[4:]
    assert [(event["event"], event["iteration"]) for event in events] == [
        ("rewind", 4),
        ("save", 6),
        ("save", 8),
    ]


def test_full_disk_is_reported_although_hooks_fail_too(
    make_state: StateMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_state(train_iters=2, save=tmp_path)
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    journal = open_journal(str(tmp_path), rank=0, train_iters=2)
    message = r"^cannot write /dev/full: No space left on device; make room for it, .* with --load"
    with pytest.raises(RecordError, match=message), journal.recording_errors():
        train(state, NEXT_TOKEN, hooks=[journal, FullDisk()])
    assert RecordError.is_local
    told = [record.getMessage() for record in caplog.records if "well" in record.msg]
    assert told == ["FullDisk did not end well: [Errno 28] No space left on device"]
    assert json.loads((tmp_path / "ended.json").read_text())["iteration"] == 1
    with pytest.raises(OSError, match="No space left"):
        train(make_state(train_iters=1), NEXT_TOKEN, hooks=[Ends()])


def test_exit_interval_does_not_cut_an_evaluation_short(make_state: StateMaker) -> None:
    class Evaluations(Hook):
        def __init__(self) -> None:
            self.taken: list[int] = []

        def on_evaluation(self, record: Record) -> None:
            self.taken.append(record["iteration"])

    state, watching = make_state(train_iters=6, exit_interval=2, eval_interval=2), Evaluations()
    stop = train(state, NEXT_TOKEN, hooks=[watching])
    assert stop is not None and stop.reason == "interval"
    assert (state.iteration, watching.taken) == (2, [2])
