"""Tests what a file of studies says, and what is refused."""

from pathlib import Path

import pytest

from megatron.trainer.errors import ConfigError
from moe_app.ablate.derived_recipes import derive_recipes
from moe_app.ablate.studies_file import Branch, choose_studies, read_studies
from tests.paths import REPO
from tests.unit.app.ablate.conftest import RUNS, STUDIES, WriteStudies


def test_a_file_says_runs_seeds_and_studies(write_studies: WriteStudies) -> None:
    published = "    published: {train: {base: 3.4, no_balancing: 3.5}, seconds_ratio: 2}\n"
    path = write_studies(studies=STUDIES + "    metric: task HellaSwag\n" + published)

    sweep = read_studies(str(path))

    assert list(sweep.runs) == ["base", "no_balancing"]
    assert sweep.seeds == (1, 2, 3)
    assert sweep.nproc_per_node == 1
    (study,) = sweep.studies
    assert study.runs == {"base": "with", "no_balancing": "without"}
    assert (study.better, study.metric, study.title) == ("base", "task HellaSwag", "balancing")
    assert study.published == {
        "train": {"base": 3.4, "no_balancing": 3.5},
        "seconds_ratio": {"": 2.0},
    }


def test_runs_follow_those_that_they_begin_from(write_studies: WriteStudies) -> None:
    runs = """\
  last: {anneal_from: {run: tail, iteration: 30}}
  tail: {anneal_from: {run: base, iteration: 20}}
"""
    sweep = read_studies(str(write_studies(runs + RUNS)))

    assert list(sweep.runs) == ["base", "tail", "last", "no_balancing"]
    assert sweep.runs["tail"].anneal_from == Branch(run="base", iteration=20)


def test_chosen_studies_bring_the_runs_that_they_need(write_studies: WriteStudies) -> None:
    runs = f"{RUNS}  trunk: {{}}\n  tail: {{anneal_from: {{run: trunk, iteration: 20}}}}\n"
    studies = f"{STUDIES}  - {{name: tails, runs: {{tail: a, base: b}}, better: none}}\n"
    sweep = read_studies(str(write_studies(runs, studies)))

    assert list(choose_studies(sweep, ["tails"]).runs) == ["base", "trunk", "tail"]
    assert choose_studies(sweep, []) is sweep
    with pytest.raises(ConfigError, match=r"--only tail: .* did you mean 'tails'"):
        choose_studies(sweep, ["tail"])


WRONG_RUNS = {
    "a typo": (
        "  base: {}\n  no_balancing: {moe_aux_los_coeff: 0.0}\n",
        r"run 'no_balancing': unknown key 'moe_aux_los_coeff' in .*studies.yaml:5; did you mean"
        r" 'moe_aux_loss_coeff'",
    ),
    "another type": (
        "  base: {}\n  no_balancing: {lr: fast}\n",
        r"run 'no_balancing': key 'lr' in .*studies.yaml:5 must be a number, not 'fast'",
    ),
    "null for what has to be": (
        "  base: {}\n  no_balancing: {lr: null}\n",
        r"key 'lr' in .*:5 must be a number, not null",
    ),
    "a key twice": (
        "  base: {}\n  no_balancing: {lr: 1.0, lr: 2.0}\n",
        r"runs.no_balancing.lr is given a second time",
    ),
    "settings that cannot be together": (
        "  base: {}\n  no_balancing: {moe_router_topk: 9}\n",
        r"run 'no_balancing': (?s:.*)moe_router_topk",
    ),
    "no mapping": ("  base: {}\n  no_balancing: 3\n", r"runs.no_balancing \('3'\) must be a map"),
    "a directory": (
        "  base: {save: x}\n  no_balancing: {}\n",
        r"runs.base: save cannot be set for a run: the sweep gives each run a directory",
    ),
    "its own seed": ("  base: {seed: 3}\n  no_balancing: {}\n", r"it is one of `seeds`"),
    "a name that is no directory's": (
        "  ../base: {}\n  no_balancing: {}\n",
        r"a directory is called so; rename the run",
    ),
    "from an unknown run": (
        RUNS + "  tail: {anneal_from: {run: bas, iteration: 10}}\n",
        r"'tail' begins from 'bas', which is no run of this file; did you mean 'base'",
    ),
    "in a circle": (
        RUNS
        + "  a: {anneal_from: {run: b, iteration: 1}}\n"
        + "  b: {anneal_from: {run: a, iteration: 1}}\n",
        r"the runs a -> b -> a begin from each other",
    ),
    "from an iteration that is not saved": (
        RUNS
        + "  tail: {anneal_from: {run: base, iteration: 15}, lr_wsd_decay_style: linear,"
        + " lr_wsd_decay_iters: 5}\n",
        r"run 'tail': it begins from iteration 15 of run 'base', which saves every 10 of 40 steps",
    ),
    "a branch without its tail": (
        RUNS + "  tail: {anneal_from: {run: base, iteration: 10}}\n",
        r"run 'tail': (?s:.*)lr_wsd_decay",
    ),
    "upcycled from a mixture": (
        RUNS + "  up: {upcycle: {run: base, num_experts: 4, moe_router_topk: 2}}\n",
        r"run 'up': upcycle: run 'base': the model has num_experts 8",
    ),
    "an unknown key of upcycling": (
        RUNS + "  up: {upcycle: {run: base, num_expert: 4}}\n",
        r"unknown key 'num_expert' of runs.up.upcycle; did you mean 'num_experts'",
    ),
}


@pytest.mark.parametrize(("runs", "message"), WRONG_RUNS.values(), ids=WRONG_RUNS)
def test_wrong_runs_are_refused(write_studies: WriteStudies, runs: str, message: str) -> None:
    path = write_studies(runs)

    with pytest.raises(ConfigError, match=message):
        derive_recipes(read_studies(str(path)))


WRONG_STUDIES = {
    "no studies": ("  3\n", r"studies \('3'\) must be a list"),
    "an unknown run": (
        "  - {name: x, runs: {base: a, no_balancin: b}, better: base}\n",
        r"unknown key 'no_balancin' of studies\[1\].runs; did you mean 'no_balancing'",
    ),
    "one run": (
        "  - {name: x, runs: {base: a}, better: base}\n",
        r"studies\[1\].runs \(a mapping\) of 'x' must have at least two runs",
    ),
    "no claim": ("  - {name: x, runs: {base: a, no_balancing: b}}\n", r"has no better; it needs"),
    "a claim on another run": (
        "  - {name: x, runs: {base: a, no_balancing: b}, better: c}\n",
        r"better \('c'\) must be one of base, no_balancing, none",
    ),
    "an unknown metric": (
        "  - {name: x, runs: {base: a, no_balancing: b}, better: base, metric: loss}\n",
        r"metric \('loss'\) must be train, valid",
    ),
    "a published word": (
        STUDIES + "    published: {train: {base: low}}\n",
        r"studies\[1\].published.train.base \('low'\) must be a number",
    ),
    "a key that there is not": (STUDIES + "    titel: x\n", r"unknown key 'titel' .* 'title'"),
    "a name twice": (STUDIES + STUDIES, r"two studies are named 'balancing'"),
}


@pytest.mark.parametrize(("studies", "message"), WRONG_STUDIES.values(), ids=WRONG_STUDIES)
def test_wrong_studies_are_refused(write_studies: WriteStudies, studies: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_studies(str(write_studies(studies=studies)))


@pytest.mark.parametrize("seeds", ["[]", "[1, 1]", "[-1]", "[x]", "3"])
def test_wrong_seeds_are_refused(write_studies: WriteStudies, seeds: str) -> None:
    with pytest.raises(ConfigError, match=r"studies.yaml:2: seeds"):
        read_studies(str(write_studies(seeds=seeds)))


def test_a_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_studies(str(tmp_path / "none.yaml"))


def test_the_studies_of_the_examples_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)  # recipes are named from there

    for path in sorted((REPO / "examples").rglob("studies.yaml")):
        sweep = read_studies(str(path))
        assert derive_recipes(sweep).keys() == sweep.runs.keys()
        assert {run for study in sweep.studies for run in study.runs} <= sweep.runs.keys()
