"""Stopping changes nothing: bitwise in the same layout, to rounding in any other."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.distributed.launcher import Outcome, flags, run_cases

# The run is planned for four steps and saved after two; a later job goes on from there.
PLAN = {"train-iters": 4, "eval-iters": 1, "global-batch-size": 4}
STOP = {**PLAN, "train-iters": 2}
# Where what bf16 has lost takes steps to show.
LONG = {**PLAN, "train-iters": 6, "lr-decay-iters": 6}
LONG_STOP = {**LONG, "train-iters": 3}

TP2: dict[str, object] = {"tensor-model-parallel-size": 2}
LAYOUTS: dict[str, dict[str, object]] = {
    "tp2": TP2,
    "ep2": {"expert-model-parallel-size": 2},
    "ep2_distributed_optimizer": {
        "expert-model-parallel-size": 2,
        "use-distributed-optimizer": True,
    },
    "pp2": {"pipeline-model-parallel-size": 2},
    "pp2_interleaved": {
        "pipeline-model-parallel-size": 2,
        "num-virtual-stages-per-pipeline-rank": 2,
    },
    "tp2_etp1": {**TP2, "expert-tensor-parallel-size": 1},
    "tp2_ep2": {**TP2, "expert-model-parallel-size": 2, "expert-tensor-parallel-size": 1},
    "dp2": {},
    "dp2_distributed_optimizer": {"use-distributed-optimizer": True},
}
FROM_DISTRIBUTED = ("dp2", "tp2", "ep2_distributed_optimizer")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict[str, Outcome]:
    """One launch: runs that never stop, runs that stop, and runs that go on from those."""

    def case(layout: Mapping[str, object], plan: Mapping[str, object], **paths: Path) -> list[str]:
        return flags(**{"lr-decay-iters": 4, **plan, **layout, **paths})

    distributed = LAYOUTS["dp2_distributed_optimizer"]
    cases = {
        "whole_tp2": case(TP2, PLAN),
        "stopped_tp2": case(TP2, STOP, save=root / "tp2"),
        "stopped_distributed": case(distributed, STOP, save=root / "distributed"),
        "whole_bf16": case({**distributed, "bf16": True}, LONG),
        "stopped_bf16": case({**distributed, "bf16": True}, LONG_STOP, save=root / "bf16"),
        "resumed_bf16": case({**distributed, "bf16": True}, LONG, load=root / "bf16"),
        "bf16_plain": case({"bf16": True}, LONG, load=root / "bf16"),
        "whole_distributed": case(distributed, PLAN),
        "resumed_distributed": case(distributed, PLAN, load=root / "distributed"),
    }
    for name, layout in LAYOUTS.items():
        cases[f"tp2_to_{name}"] = case(layout, PLAN, load=root / "tp2")
    for name in FROM_DISTRIBUTED:
        cases[f"distributed_to_{name}"] = case(LAYOUTS[name], PLAN, load=root / "distributed")
    dense = {"num-experts": "None", "ffn-hidden-size": 40, "attention": "standard"}
    cases["whole_dense"] = case({**dense, **distributed}, PLAN)
    cases["stopped_dense"] = case({**dense, **distributed}, STOP, save=root / "dense")
    cases["resumed_dense"] = case({**dense, **distributed}, PLAN, load=root / "dense")
    single = {
        "whole": case({}, PLAN),
        "stopped": case({}, STOP, save=root / "single"),
        "resumed": case({}, PLAN, load=root / "single", save=root / "single"),
        "tp2_to_single": case({}, PLAN, load=root / "tp2"),
        "finetuned": case({"finetune": True}, STOP, load=root / "tp2"),
    }
    return {**run_cases(2, cases, root / "two"), **run_cases(1, single, root / "one")}


def last_two(outcome: Outcome, key: str) -> list[float]:
    assert outcome.error is None, outcome.error
    return outcome.series(key)[-2:]


def assert_bitwise(resumed: Outcome, whole: Outcome) -> None:
    keys = ("lm_loss", "grad_norm", "learning_rate", "load_balancing_loss", "z_loss")
    for key in keys[: 5 if whole.series("z_loss") else 3]:
        assert len(last_two(whole, key)) == 2, key
        assert last_two(resumed, key) == last_two(whole, key), key
    assert resumed.series("iteration")[0] == len(whole.series("lm_loss")) // 2 + 1
    for key, expected in whole.weights.items():
        assert torch.equal(resumed.weights[key], expected), key


@pytest.mark.parametrize(
    ("resumed", "whole"),
    [
        ("resumed", "whole"),
        ("tp2_to_tp2", "whole_tp2"),
        ("resumed_distributed", "whole_distributed"),
        ("resumed_bf16", "whole_bf16"),
        ("resumed_dense", "whole_dense"),
    ],
)
def test_same_layout_resumes_bitwise(
    resumed: str, whole: str, outcomes: dict[str, Outcome]
) -> None:
    assert_bitwise(outcomes[resumed], outcomes[whole])


@pytest.mark.parametrize(
    "name",
    [
        *(f"tp2_to_{name}" for name in LAYOUTS),
        "tp2_to_single",
        *(f"distributed_to_{name}" for name in FROM_DISTRIBUTED),
    ],
)
def test_another_layout_goes_on_alike(name: str, outcomes: dict[str, Outcome]) -> None:
    """Weights, moments, step count, schedule and data position all have to arrive for this."""
    for key in ("lm_loss", "load_balancing_loss", "z_loss"):
        expected = last_two(outcomes["whole"], key)
        assert last_two(outcomes[name], key) == pytest.approx(expected, rel=1e-5), key
    expected = last_two(outcomes["whole"], "grad_norm")
    assert last_two(outcomes[name], "grad_norm") == pytest.approx(expected, rel=1e-4)


def test_bf16_master_weights_move_between_optimizers(outcomes: dict[str, Outcome]) -> None:
    """From the distributed optimizer to the plain one; master weights lost would show at 1e-3."""
    expected = last_two(outcomes["whole_bf16"], "lm_loss")
    assert last_two(outcomes["bf16_plain"], "lm_loss") == pytest.approx(expected, rel=1e-4)


def test_finetune_takes_the_weights_alone(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["finetuned"]
    assert found.series("iteration")[:2] == [1, 2]
    assert found.series("consumed_samples")[0] == 4
    # The first batch is that of the first run, seen by weights that learned from it.
    assert found.series("lm_loss")[0] != outcomes["whole"].series("lm_loss")[0]


def test_moments_matter(outcomes: dict[str, Outcome]) -> None:
    """Without its moments AdamW takes other steps, so the tests above would notice."""
    found = outcomes["finetuned"].series("learning_rate")
    assert found[0] == outcomes["whole"].series("learning_rate")[0]


def test_checkpoint_directory_is_as_documented(root: Path, outcomes: dict[str, Outcome]) -> None:
    del outcomes
    names = {file.name for file in (root / "single" / "iter_0000004").iterdir()}
    assert {"config.yaml", "run.json", "manifest.json", "common.pt", ".metadata"} <= names
    tracker = root / "single" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text().strip() == "4"


def test_used_directory_is_never_written_over(root: Path, outcomes: dict[str, Outcome]) -> None:
    """Neither by a fresh run, nor by one that loads elsewhere, nor by one that takes weights."""
    del outcomes
    used = root / "used"
    shutil.copytree(root / "single", used)
    before = (used / "metrics.jsonl").read_bytes()
    attempts = {
        "fresh": flags(**STOP, save=used),
        "elsewhere": flags(**STOP, save=used, load=root / "single"),
        "finetune": flags(**STOP, save=used, load=used, finetune=True),
    }
    for name, found in run_cases(1, attempts, root / "again").items():
        assert found.error is not None, name
        assert f"{used} holds an earlier run; continue it with --load {used}" in found.error
    assert (used / "metrics.jsonl").read_bytes() == before


def test_a_first_save_that_died_does_not_block_the_chain(root: Path) -> None:
    directory = root / "died"
    (directory / "iter_0000002.tmp-abcd1234").mkdir(parents=True)
    chain = flags(**STOP, save=directory, load=f"{directory}/.")
    found = run_cases(1, {"chain": chain}, root / "chain")["chain"]
    assert found.error is None, found.error
    assert found.series("iteration")[:2] == [1, 2]


@pytest.mark.parametrize("event", ["start", "save"])
def test_a_job_that_died_before_it_saved_begins_again_from_the_other_run(
    event: str, root: Path, outcomes: dict[str, Outcome]
) -> None:
    directory = root / f"stillborn_{event}"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text('{"iteration": 3, "lm_loss": 9.0}\n')
    (directory / "events.jsonl").write_text(json.dumps({"iteration": 2, "event": event}) + "\n")
    again = flags(**PLAN, save=directory, load=root / "single", ckpt_step=2)
    found = run_cases(1, {"again": again}, root / "again")["again"]
    if event == "save":
        assert f"{directory} holds an earlier run" in str(found.error)
        return
    assert found.error is None, found.error
    assert last_two(found, "lm_loss") == last_two(outcomes["whole"], "lm_loss")


def test_repeated_command_goes_on_with_the_run_that_it_began(
    root: Path, outcomes: dict[str, Outcome]
) -> None:
    """As torchrun repeats it: from the new run's checkpoint, not once more from the other's."""
    single, new, tuned = root / "single", root / "new", root / "tuned"
    command = flags(**PLAN, save=new, load=single, ckpt_step=2, exit_interval=3)
    finetune = flags(**PLAN, save=tuned, load=single, finetune=True, exit_interval=3)
    found = run_cases(
        1,
        {
            "first": command,
            "again": command,
            "tuned_first": finetune,
            "tuned_again": finetune,
        },
        root / "repeated",
    )
    whole = outcomes["whole"].series("lm_loss")
    assert found["first"].series("lm_loss") == whole[2:3]
    assert found["again"].series("lm_loss") == whole[3:]
    assert found["tuned_first"].series("iteration") == [1, 2, 3]
    assert found["tuned_again"].series("iteration")[0] == 4


@pytest.mark.parametrize("modules", ["core_attn", "moe", "core_attn moe"])
def test_each_recompute_module_trains_alike(
    modules: str, root: Path, outcomes: dict[str, Outcome]
) -> None:
    case = [*flags(**STOP, **{"lr-decay-iters": 4}), "--recompute-granularity", "selective"]
    case += ["--recompute-modules", *modules.split()]
    found = run_cases(1, {"case": case}, root / modules.replace(" ", "_"))["case"]
    expected = outcomes["stopped"].series("lm_loss")
    assert found.series("lm_loss") == pytest.approx(expected, rel=1e-6)
    assert found.series("grad_norm") == pytest.approx(
        outcomes["stopped"].series("grad_norm"), rel=1e-6
    )
