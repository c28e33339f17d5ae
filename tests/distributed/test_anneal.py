"""Phases and branches while training: as if never stopped, on one rank and on two."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.trainer.data.writer import TokenFileWriter
from tests.distributed.launcher import Outcome, flags, run_cases

# 128 tokens a step. Four steps of each phase; the decay begins with the second.
STEP, BORDER, END = 128, 4, 8
WINDOWS = {"web": 40, "code": 24, "math": 11}
SCHEDULE = {
    "lr-warmup-iters": 2,
    "lr-warmup-init": 0.0003,
    "lr-decay-style": "WSD",
    "lr-wsd-decay-style": "geometric",
    "lr-wsd-decay-iters": END - BORDER,
}
TRUNK = {"lr-warmup-iters": 2, "lr-warmup-init": 0.0003, "lr-decay-style": "constant"}
OTHER_TAIL = {"lr-wsd-decay-style": "linear", "lr-wsd-decay-iters": 3, "min-lr": 0.0}


def case(**settings: Any) -> list[str]:
    """Flags of a run on token files; `recipe` is the file with its phases or mixture."""
    recipe = settings.pop("recipe")
    small = {"num-layers": 2, "micro-batch-size": 4}
    settings = {**small, **settings, **({"save-interval": 1} if "save" in settings else {})}
    length = settings.pop("train_iters", None)
    given = flags(**settings)
    given.remove("--mock-data")
    at = given.index("--train-iters")
    given[at : at + 2] = [] if length is None else ["--train-iters", str(length)]
    return ["--config", str(recipe), *given]


class Bench:
    """Token files, recipes, and every run of this module."""

    def __init__(self, root: Path) -> None:
        self.root = root
        generator = np.random.default_rng(5)
        for name, windows in WINDOWS.items():
            with TokenFileWriter(str(root / name), vocab_size=120) as writer:
                writer.add_document(generator.integers(0, 120, windows * 16 + 1).tolist())
                writer.finish()
        web, code, math = (str(root / name) for name in WINDOWS)
        stable, decay = [0.7, web, 0.3, code], [0.4, web, 0.2, code, 0.4, math]
        self.write("stable", data_path=stable)
        self.write("decay", data_path=decay)
        self.write("phases", phases=self.phases(4 * STEP - 5, stable, 4 * STEP, decay))
        self.write("longer", phases=self.phases(6 * STEP, stable, 4 * STEP, decay))
        self.write("shorter", phases=self.phases(3 * STEP, stable, 5 * STEP, decay))
        self.write("other_past", phases=self.phases(4 * STEP, decay, 4 * STEP, decay))

    def write(self, name: str, **values: Any) -> None:
        # JSON is YAML.
        (self.root / f"{name}.yaml").write_text(json.dumps(values))

    @staticmethod
    def phases(first: int, stable: list[Any], second: int, decay: list[Any]) -> list[Any]:
        names = zip(("stable", "decay"), (first, second), (stable, decay), strict=True)
        return [
            {"name": name, "train_tokens": tokens, "data_path": [str(part) for part in path]}
            for name, tokens, path in names
        ]

    def recipe(self, name: str) -> Path:
        return self.root / f"{name}.yaml"

    def common(self, ranks: int) -> dict[str, list[str]]:
        """The runs that are made on one rank and on two."""
        at = self.root / f"on{ranks}"
        branch: dict[str, Any] = {"recipe": self.recipe("decay"), "load": at / "trunk"}
        one = {**branch, **SCHEDULE, "anneal_from": BORDER, "save": at / "one"}
        two = {**branch, **OTHER_TAIL, "anneal_from": BORDER, "seed": 42, "save": at / "two"}
        whole: dict[str, Any] = {"recipe": self.recipe("phases"), **SCHEDULE}
        found = {
            "whole": case(**whole, save=at / "whole"),
            "trunk": case(
                recipe=self.recipe("stable"), **TRUNK, train_iters=BORDER, save=at / "trunk"
            ),
            "one": case(**one),
            "two": case(**two),
            # The same commands again, from the middle of the branch.
            "one_again": case(**{**one, "ckpt_step": 5}),
            "two_again": case(**{**two, "load": at / "two", "ckpt_step": 5}),
        }
        for stop in (BORDER - 1, BORDER, BORDER + 1):
            found[f"resumed_{stop}"] = case(**whole, load=at / "whole", ckpt_step=stop)
        return found

    def single(self) -> dict[str, list[str]]:
        """What needs one rank only: what is refused, and what is allowed to change."""
        at = self.root / "on1"
        whole: dict[str, Any] = {**SCHEDULE, "recipe": self.recipe("phases"), "load": at / "whole"}
        linear = {**whole, "lr-wsd-decay-style": "linear"}
        branch: dict[str, Any] = {
            **OTHER_TAIL,
            "recipe": self.recipe("decay"),
            "load": at / "trunk",
        }
        return {
            "no_such_step": case(**branch, anneal_from=9),
            "of_no_branch": case(**{**branch, "save": at / "whole"}, anneal_from=BORDER),
            "nothing_to_continue": case(
                **{**branch, "load": at / "new", "save": at / "new"}, anneal_from=BORDER
            ),
            "without_the_flag": case(
                **{**branch, "load": at / "two", "recipe": self.recipe("decay")},
                train_iters=7,
                seed=42,
            ),
            "rising": case(**{**branch, "lr": 0.01, "min-lr": 0.005}, anneal_from=BORDER),
            "other_tail": case(**linear, ckpt_step=6),
            "other_tail_taken": case(**linear, ckpt_step=6, override_schedule=True),
            "other_past": case(**{**whole, "recipe": self.recipe("other_past")}, ckpt_step=5),
            "longer": case(**{**whole, "recipe": self.recipe("longer")}, ckpt_step=3),
            "longer_from_start": case(recipe=self.recipe("longer"), **SCHEDULE),
            "longer_too_late": case(**{**whole, "recipe": self.recipe("longer")}, ckpt_step=5),
            "begun_before": case(
                **{**whole, "recipe": self.recipe("phases"), "lr-wsd-decay-iters": 5}, ckpt_step=4
            ),
        }

    def moved(self) -> dict[str, list[str]]:
        """Saved by one rank, continued by two."""
        whole: dict[str, Any] = {**SCHEDULE, "recipe": self.recipe("phases")}
        at = self.root / "on1"
        return {
            f"moved_{stop}": case(**whole, load=at / "whole", ckpt_step=stop)
            for stop in (BORDER - 1, BORDER, BORDER + 1)
        }


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("anneal")


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict[str, Outcome]:
    bench = Bench(root)
    one = run_cases(1, {**bench.common(1), **bench.single()}, root / "one_rank")
    two = run_cases(2, {**bench.common(2), **bench.moved()}, root / "two_ranks")
    return {
        **{f"1 {name}": outcome for name, outcome in one.items()},
        **{f"2 {name}": outcome for name, outcome in two.items()},
    }


def assert_ends_alike(found: Outcome, whole: Outcome, *, steps: int) -> None:
    """The last steps and the final weights are bitwise those of the other run."""
    assert found.error is None, found.error
    for key in ("iteration", "lm_loss", "grad_norm", "learning_rate", "consumed_samples"):
        assert len(found.series(key)) == steps, key
        assert found.series(key) == whole.series(key)[-steps:], key
    assert found.weights.keys() == whole.weights.keys() != set()
    for key, weight in whole.weights.items():
        assert torch.equal(found.weights[key], weight), key


def per_source(outcome: Outcome) -> list[Any]:
    return outcome.series("consumed_samples_per_source")


@pytest.mark.parametrize("ranks", [1, 2])
def test_trunk_and_branch_are_bitwise_the_run_with_two_phases(
    ranks: int, outcomes: dict[str, Outcome]
) -> None:
    """Same seed, mixture and tail: weights, moments, data and learning rate all have to arrive."""
    whole, trunk = outcomes[f"{ranks} whole"], outcomes[f"{ranks} trunk"]
    assert whole.series("phase") == ["stable"] * 4 + ["decay"] * 4
    assert trunk.series("lm_loss") == whole.series("lm_loss")[:4]
    assert_ends_alike(outcomes[f"{ranks} one"], whole, steps=4)
    assert per_source(outcomes[f"{ranks} one"]) == per_source(whole)[4:]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_resume_on_each_side_of_the_border_is_bitwise_the_run_that_never_stopped(
    stop: int, ranks: int, outcomes: dict[str, Outcome]
) -> None:
    found, whole = outcomes[f"{ranks} resumed_{stop}"], outcomes[f"{ranks} whole"]
    assert_ends_alike(found, whole, steps=8 - stop)
    assert per_source(found) == per_source(whole)[stop:]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "steps"), [("one", 4), ("two", 3)])
def test_branch_started_again_goes_on_bitwise(
    name: str, steps: int, ranks: int, outcomes: dict[str, Outcome]
) -> None:
    branch = outcomes[f"{ranks} {name}"]
    assert branch.series("iteration") == list(range(5, 5 + steps))
    assert_ends_alike(outcomes[f"{ranks} {name}_again"], branch, steps=steps - 1)


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_resume_with_another_number_of_ranks_draws_the_same(
    stop: int, outcomes: dict[str, Outcome]
) -> None:
    found, whole = outcomes[f"2 moved_{stop}"], outcomes["1 whole"]
    assert found.error is None, found.error
    assert per_source(found) == per_source(whole)[stop:]
    assert found.series("learning_rate") == whole.series("learning_rate")[stop:]
    # fp32 sums in another order, as in test_parity.py; another sample would show at 1e-2.
    assert found.series("lm_loss") == pytest.approx(whole.series("lm_loss")[stop:], rel=1e-5)


def test_branches_from_one_checkpoint_have_tails_and_data_of_their_own(
    outcomes: dict[str, Outcome],
) -> None:
    one, two = outcomes["1 one"], outcomes["1 two"]
    assert one.series("learning_rate") == pytest.approx(
        [0.003 * 0.1 ** (step / 4) for step in range(4)], rel=1e-12
    )
    assert two.series("learning_rate") == pytest.approx([0.003, 0.002, 0.001], rel=1e-12)
    # The first step of both is taken by the trunk's weights, on other samples.
    assert one.series("lm_loss")[0] != two.series("lm_loss")[0]


def test_trunk_stays_as_it_is(root: Path, outcomes: dict[str, Outcome]) -> None:
    """Every checkpoint of it can be branched from once more."""
    del outcomes
    trunk = root / "on1" / "trunk"
    before = digests(trunk)
    bench_flags = case(
        recipe=root / "decay.yaml", load=trunk, anneal_from=3, save=root / "third", **OTHER_TAIL
    )
    found = run_cases(1, {"third": bench_flags}, root / "again")["third"]
    assert found.error is None, found.error
    assert found.series("iteration") == [4, 5, 6]
    assert digests(trunk) == before
    saved = json.loads((root / "third" / "iter_0000006" / "run.json").read_text())
    assert saved["schedule"] == {
        "anneal_from": 3,
        "anneal_lr": 0.003,
        "min_lr": 0.0,
        "lr_wsd_decay_style": "linear",
        "lr_wsd_decay_iters": 3,
    }
    assert saved["learning_rate"] == 0.0
    assert [phase["inherited"] for phase in saved["data"]["phases"]] == [True, False]


def test_stable_phase_can_be_made_longer_before_the_decay(outcomes: dict[str, Outcome]) -> None:
    assert_ends_alike(outcomes["1 longer"], outcomes["1 longer_from_start"], steps=7)


def test_another_schedule_is_followed_where_it_is_asked_for(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["1 other_tail_taken"]
    assert found.error is None, found.error
    linear = [0.0003 + 0.0027 * (1 - step / 4) for step in (2, 3)]
    assert found.series("learning_rate") == pytest.approx(linear, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_step", "has no checkpoint of iteration 9; it has 1, 2, 3, 4"),
        (
            "of_no_branch",
            "is of a run that is no branch, and --anneal-from is 4; a branch has a directory of its"
            " own and the same --anneal-from for as long as it runs; give --save another directory",
        ),
        (
            "nothing_to_continue",
            "is given to --load and --save alike and holds no checkpoint, so there is no branch to"
            " continue; begin it with --load set to the run that has iteration 4",
        ),
        ("without_the_flag", "--anneal-from: checkpoint 4, this run None"),
        (
            "rising",
            "min_lr (0.005) is above the learning rate that the branch begins with (0.003, that of"
            " step 4 of the run it branches from); a decay must not rise; lower --min-lr",
        ),
        (
            "other_tail",
            "the checkpoint follows another learning-rate schedule: --lr-wsd-decay-style:"
            " checkpoint geometric, this run linear. Give this run the checkpoint's values"
            " (--lr-decay-iters is --train-iters where it is not given), follow this run's from"
            " here on with --override-schedule, or start a new schedule from the weights with"
            " --finetune",
        ),
        (
            "other_past",
            "the checkpoint was trained on other data: phase 1 (stable) sources: checkpoint"
            " ['web', 'code'], this run ['web', 'code', 'math']",
        ),
        (
            "longer_too_late",
            "--lr-decay-tokens: checkpoint 1024, this run 1280 (the decay would begin at token 768,"
            " the checkpoint's at 512, and 640 tokens are done: it can be moved only before it"
            " begins, to a token still to come)",
        ),
        (
            "begun_before",
            "--lr-wsd-decay-tokens: checkpoint 512, this run 640 (the decay would begin at token"
            " 384, the checkpoint's at 512, and 512 tokens are done",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused(
    name: str, message: str, outcomes: dict[str, Outcome]
) -> None:
    error = outcomes[f"1 {name}"].error
    assert error is not None
    assert message in error
