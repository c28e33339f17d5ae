"""Makes the recipe of each run of a sweep, and checks all of them before any starts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron.trainer.config.cli import dump_config, flatten, with_overrides
from megatron.trainer.config.durations import resolve_lengths
from megatron.trainer.config.recipe import FieldPlace, read_values, schema_of
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from moe_app.ablate.studies_file import Branch, Run, Sweep, UpcycleFrom
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_ext.upcycling import Upcycling

_ELSEWHERE = "RUN"
"""Stands for directories while a recipe is checked."""


def derive_recipes(sweep: Sweep) -> dict[str, PretrainConfig]:
    """Return each run's config by name, with the first seed and without directories.

    Raises:
        ConfigError: a recipe or an override is wrong, or a run cannot begin from another; the
            message names file and run.
    """
    schema = schema_of(PretrainConfig)
    bases: dict[str, PretrainConfig] = {}
    found: dict[str, PretrainConfig] = {}
    for name, run in sweep.runs.items():
        if run.recipe not in bases:
            argv = ["--config", run.recipe]
            bases[run.recipe] = parse_recipe(argv, prog="ablate", description="")
        try:
            found[name] = _derive(sweep, run, bases[run.recipe], found, schema)
        except ConfigError as error:
            raise ConfigError(f"{sweep.path}: run {name!r}: {error}") from error
    return found


def with_seed(cfg: PretrainConfig, seed: int) -> PretrainConfig:
    """Return a run's config under one of the seeds."""
    return replace(cfg, training=replace(cfg.training, seed=seed))


def recipe_text(sweep: Sweep, run: Run, cfg: PretrainConfig) -> str:
    """Format the recipe: every setting, so that later defaults do not change it."""
    changed = ", ".join(str(key.value) for key, _ in run.overrides) or "nothing"
    return (
        f"# ranks: {sweep.nproc_per_node}\n"
        f"# Run {run.name} of a sweep: {run.recipe}, changed in {changed}.\n"
        f"{dump_config(cfg)}"
    )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Holds a setting that two configs have differently."""

    key: str
    """Its name."""
    before: object
    """In the one."""
    after: object
    """In the other."""

    def __str__(self) -> str:
        """Return both values."""
        return f"{self.key} was {self.before} and is {self.after}"


def differences(before: PretrainConfig, after: PretrainConfig) -> list[Difference]:
    """Return the settings in which two configs differ."""
    old, new = flatten(before), flatten(after)
    return [
        Difference(key=key, before=old[key], after=value)
        for key, value in new.items()
        if old[key] != value
    ]


def _derive(
    sweep: Sweep,
    run: Run,
    base: PretrainConfig,
    others: Mapping[str, PretrainConfig],
    schema: Mapping[str, FieldPlace],
) -> PretrainConfig:
    values, _ = read_values(run.overrides, schema, path=sweep.path)
    fixed: dict[str, object] = {"save": None, "load": None, "anneal_from": None}
    if run.anneal_from is not None:
        fixed["anneal_from"] = run.anneal_from.iteration
    cfg = with_overrides(base, {**fixed, **values}, resolve=resolve_lengths)
    if run.upcycle is not None:
        cfg = _with_architecture(cfg, run.upcycle, others[run.upcycle.run], values)
    if run.anneal_from is not None:
        _check_checkpoint(run.anneal_from, others[run.anneal_from.run])
    checkpoint = replace(cfg.checkpoint, save=_ELSEWHERE)
    if run.after is not None:
        checkpoint = replace(checkpoint, load=_ELSEWHERE + "2")
    validate(replace(cfg, checkpoint=checkpoint), sweep.nproc_per_node)
    return with_seed(cfg, sweep.seeds[0])


def upcycling_rule(source: UpcycleFrom, *, seed: int) -> Upcycling:
    """Return the rule by which a run is upcycled."""
    return Upcycling(
        num_experts=source.num_experts,
        topk=source.moe_router_topk,
        granularity=source.granularity,
        layer_freq=source.moe_layer_freq,
        noise=source.noise,
        drop=source.drop,
        preserve_function=source.preserve_function,
        seed=seed,
    )


def _with_architecture(
    cfg: PretrainConfig, source: UpcycleFrom, dense: PretrainConfig, values: Mapping[str, object]
) -> PretrainConfig:
    """Return the config with the architecture that upcycling makes.

    Raises:
        ConfigError: it cannot be made, or the run sets another.
    """
    _check_iteration(source.run, source.iteration, dense)
    try:
        made: dict[str, Any] = upcycling_rule(source, seed=0).model(dense.model).architecture()
    except ValueError as error:
        raise ConfigError(f"upcycle: run {source.run!r}: {error}") from error
    own = cfg.model.architecture()
    wrong = [
        f"{key} ({own[key]}, not {value})"
        for key, value in made.items()
        if key in values and own[key] != value
    ]
    if wrong:
        raise ConfigError(
            f"upcycling run {source.run!r} makes another model than this run sets:"
            f" {', '.join(wrong)}; they must agree; leave these keys out"
        )
    return replace(cfg, model=replace(cfg.model, **made))


def _check_checkpoint(branch: Branch, trunk: PretrainConfig) -> None:
    _check_iteration(branch.run, branch.iteration, trunk)


def _check_iteration(run: str, iteration: int | None, cfg: PretrainConfig) -> None:
    """Refuse a checkpoint that a run will not have saved."""
    if iteration is None:
        return
    last, interval = cfg.training.train_iters, cfg.checkpoint.save_interval
    is_saved = iteration == last or (interval and iteration and iteration % interval == 0)
    if iteration > last or not is_saved:
        raise ConfigError(
            f"it begins from iteration {iteration} of run {run!r}, which saves every"
            f" {interval} of {last} steps (save_interval) and at the end; name one of those"
        )
    keep, every = cfg.checkpoint.keep_last, cfg.checkpoint.keep_every
    if keep is not None and iteration != last and not (every and iteration % every == 0):
        raise ConfigError(
            f"it begins from iteration {iteration} of run {run!r}, which keeps its last {keep}"
            " checkpoints (keep_last); let keep_every of that run divide the iteration"
        )
