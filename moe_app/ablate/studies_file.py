"""Reads a file of studies: runs as changes of a recipe, and what is compared with what."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import yaml

from megatron.trainer.config.near_names import did_you_mean
from megatron.trainer.config.recipe import recipe_nodes
from megatron.trainer.errors import ConfigError
from moe_app.ablate.yaml_nodes import Place, read_entries, required

NONE = "none"
"""Stands in `better` for no difference."""
TRAIN, VALID = "train", "valid"
"""Metrics: training and validation loss."""
TASK = "task"
"""Begins the metric of a task's accuracy."""
RATIOS = ("tokens_ratio", "flops_ratio", "seconds_ratio")
"""What `published` may say of the way to an equal loss, a number each."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_FILE_KEYS = ("recipe", "nproc_per_node", "seeds", "runs", "studies")
_STUDY_KEYS = ("name", "title", "source", "runs", "better", "metric", "published", "note")
_UPCYCLE_KEYS = (
    *("run", "iteration", "num_experts", "moe_router_topk", "moe_layer_freq"),
    *("granularity", "noise", "drop", "preserve_function"),
)
_RESERVED = {
    "save": "the sweep gives each run a directory",
    "load": "it names a run to begin from by `anneal_from` or `upcycle`",
    "seed": "it is one of `seeds`",
    "preset": "name a `recipe` of its own that has the preset",
}


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Says from where a run branches."""

    run: str
    """The trunk."""
    iteration: int
    """Its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class UpcycleFrom:
    """Says how a run begins as an upcycled dense one."""

    run: str
    """The dense run."""
    num_experts: int
    """Experts per layer."""
    moe_router_topk: int
    """Experts per token."""
    iteration: int | None = None
    """Of the dense run's checkpoint; None is its last."""
    moe_layer_freq: int = 1
    """Every how many layers one is upcycled."""
    granularity: int = 1
    """Experts that a feed-forward layer is split into."""
    noise: float = 0.0
    """Share of values drawn anew."""
    drop: float = 0.0
    """Share of width drawn anew."""
    preserve_function: bool = False
    """Divide the gates by their sum."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Describes a variant."""

    name: str
    """Its directory's name too."""
    recipe: str
    """What it changes."""
    overrides: tuple[tuple[yaml.Node, yaml.Node], ...] = field(default=(), compare=False)
    """Keys and values of the recipe that it sets."""
    anneal_from: Branch | None = None
    """The run that it branches from."""
    upcycle: UpcycleFrom | None = None
    """The dense run whose weights it begins with."""

    @property
    def after(self) -> str | None:
        """Return the run that must be done before it."""
        source = self.anneal_from or self.upcycle
        return source.run if source else None


@dataclass(frozen=True, kw_only=True)
class Study:
    """Describes a comparison of runs."""

    name: str
    """File name of its figure."""
    title: str
    """Heading."""
    source: str
    """Where the finding was published."""
    runs: Mapping[str, str]
    """Labels by run, in the order of the file."""
    better: str
    """The run that was published to be better than each other, or `none`."""
    metric: str = VALID
    """What decides: `train`, `valid`, `valid SET` or `task NAME`."""
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Published values by metric and run; of `RATIOS` under the empty name."""
    note: str = ""
    """A remark for the report."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Holds a file of studies."""

    path: str
    """Of the file."""
    nproc_per_node: int
    """Ranks of a run."""
    seeds: tuple[int, ...]
    """Each run is trained with each."""
    runs: Mapping[str, Run]
    """By name, each behind those that it begins from."""
    studies: tuple[Study, ...]
    """In the order of the file."""


def read_studies(path: str) -> Sweep:
    """Read and check a file of studies; overrides are checked by `derived_recipes`.

    Raises:
        ConfigError: it cannot be read, or says something impossible.
    """
    top = read_entries(recipe_nodes(path), path, "", _FILE_KEYS)
    common = required(top, "recipe", of=path).text()
    seeds = tuple(each.whole(least=0) for each in required(top, "seeds", of=path).items())
    if not seeds or len(set(seeds)) < len(seeds):
        raise top["seeds"].error("must be different numbers, at least one", "drop the second")
    runs = {
        name: _read_run(name, place, common)
        for name, place in required(top, "runs", of=path).entries().items()
    }
    studies = [_read_study(each, runs) for each in required(top, "studies", of=path).items()]
    names = [study.name for study in studies]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: two studies are named {name!r}; rename one of them")
    return Sweep(
        path=path,
        nproc_per_node=top["nproc_per_node"].whole(least=1) if "nproc_per_node" in top else 1,
        seeds=seeds,
        runs=_ordered(runs, path),
        studies=tuple(studies),
    )


def choose_studies(sweep: Sweep, only: Collection[str]) -> Sweep:
    """Return the sweep of some studies, with the runs that they need; all if none is named.

    Raises:
        ConfigError: there is no such study.
    """
    if not only:
        return sweep
    names = [study.name for study in sweep.studies]
    for name in only:
        if name not in names:
            hint = did_you_mean(name, names) or f"; the studies are {', '.join(names)}"
            raise ConfigError(f"--only {name}: {sweep.path} has no such study{hint}")
    studies = tuple(study for study in sweep.studies if study.name in only)
    wanted = {run for study in studies for run in study.runs}
    for name in reversed(list(sweep.runs)):
        after = sweep.runs[name].after
        if name in wanted and after is not None:
            wanted.add(after)
    runs = {name: run for name, run in sweep.runs.items() if name in wanted}
    return Sweep(
        path=sweep.path,
        nproc_per_node=sweep.nproc_per_node,
        seeds=sweep.seeds,
        runs=runs,
        studies=studies,
    )


def _read_run(name: str, place: Place, common: str) -> Run:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{place.where}: the name must be letters, digits, '.', '_' and '-', because a"
            " directory is called so; rename the run"
        )
    entries = place.entries()
    for key, why in _RESERVED.items():
        if key in {each.replace("-", "_") for each in entries}:
            raise ConfigError(f"{place.where}: {key} cannot be set for a run: {why}; leave it out")
    own = ("recipe", "anneal_from", "upcycle")
    branch, upcycle = entries.get("anneal_from"), entries.get("upcycle")
    if branch is not None and upcycle is not None:
        raise ConfigError(
            f"{place.where} has anneal_from and upcycle; a run begins from one other; drop one"
        )
    return Run(
        name=name,
        recipe=entries["recipe"].text() if "recipe" in entries else common,
        overrides=tuple(
            pair for pair in place.pairs() if getattr(pair[0], "value", None) not in own
        ),
        anneal_from=None if branch is None or branch.is_null else _read_branch(branch),
        upcycle=None if upcycle is None or upcycle.is_null else _read_upcycle(upcycle),
    )


def _read_branch(place: Place) -> Branch:
    entries = place.entries(("run", "iteration"))
    return Branch(
        run=required(entries, "run", of=place.where).text(),
        iteration=required(entries, "iteration", of=place.where).whole(least=0),
    )


def _read_upcycle(place: Place) -> UpcycleFrom:
    entries = place.entries(_UPCYCLE_KEYS)
    for key in ("run", "num_experts", "moe_router_topk"):
        required(entries, key, of=place.where)
    shares = {key: entries[key].number() for key in ("noise", "drop") if key in entries}
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise entries[key].error("must be from 0 to 1", "change it")
    counts = {
        key: entries[key].whole(least=1)
        for key in ("granularity", "moe_layer_freq")
        if key in entries
    }
    return UpcycleFrom(
        run=entries["run"].text(),
        num_experts=entries["num_experts"].whole(least=1),
        moe_router_topk=entries["moe_router_topk"].whole(least=1),
        iteration=entries["iteration"].whole(least=0) if "iteration" in entries else None,
        granularity=counts.get("granularity", 1),
        moe_layer_freq=counts.get("moe_layer_freq", 1),
        preserve_function="preserve_function" in entries and entries["preserve_function"].boolean(),
        noise=shares.get("noise", 0.0),
        drop=shares.get("drop", 0.0),
    )


def _ordered(runs: Mapping[str, Run], path: str) -> dict[str, Run]:
    """Return the runs, each behind the one that it begins from, else as they are."""
    for run in runs.values():
        if run.after is not None and run.after not in runs:
            raise ConfigError(
                f"{path}: run {run.name!r} begins from {run.after!r}, which is no run of this file"
                f"{did_you_mean(run.after, runs)}; add it, or change the name"
            )
    found: dict[str, Run] = {}

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise ConfigError(
                f"{path}: the runs {' -> '.join((*above, name))} begin from each other; let one"
                " begin from initial weights"
            )
        after = runs[name].after
        if after is not None:
            add(after, (*above, name))
        found.setdefault(name, runs[name])

    for name in runs:
        add(name, ())
    return found


def _read_study(place: Place, runs: Mapping[str, Run]) -> Study:
    entries = place.entries(_STUDY_KEYS)
    name = required(entries, "name", of=place.where).text()
    if not _NAME.fullmatch(name):
        raise entries["name"].error(
            "must be letters, digits, '.', '_' and '-', because files are called so", "rename it"
        )
    chosen = required(entries, "runs", of=place.where)
    labels = {run: each.text() for run, each in chosen.entries(tuple(runs)).items()}
    if len(labels) < 2:
        raise chosen.error(f"of {name!r} must have at least two runs", "add one")
    better = required(entries, "better", of=place.where)
    if better.text() not in (*labels, NONE):
        raise better.error(f"must be one of {', '.join((*labels, NONE))}", "change it")
    metric = entries["metric"].text() if "metric" in entries else VALID
    if metric not in (TRAIN, VALID) and not re.fullmatch(r"(valid|task) \S.*", metric):
        raise entries["metric"].error(
            "must be train, valid, `valid SET` or `task NAME`", "change it"
        )
    optional = {key: entries[key].text() for key in ("title", "source", "note") if key in entries}
    return Study(
        name=name,
        title=optional.get("title", name),
        source=optional.get("source", ""),
        note=optional.get("note", ""),
        runs=labels,
        better=better.text(),
        metric=metric,
        published=_read_published(entries["published"], labels) if "published" in entries else {},
    )


def _read_published(place: Place, labels: Mapping[str, str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for metric, values in place.entries().items():
        if metric in RATIOS:
            found[metric] = {"": values.number()}
        else:
            known = values.entries(tuple(labels))
            found[metric] = {run: each.number() for run, each in known.items()}
    return found
