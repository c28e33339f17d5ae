"""Runs one measure of a collection: its tables and figures, from its flags."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.trainer.errors import ConfigError, printable
from megatron.trainer.records.run_dir import LOAD_NAME, LOAD_TITLES, sample_records
from moe_app.analyze.chart import Flow, PanelGrid
from moe_app.analyze.collection import Collection
from moe_app.analyze.measure_weights import measure_similarity
from moe_app.analyze.measure_words import measure_vocabulary
from moe_app.analyze.measures import (
    Measured,
    measure_coactivation,
    measure_domains,
    measure_load,
    measure_saturation,
)
from moe_app.analyze.routing_figures import (
    coactivation_figures,
    domain_figures,
    history_figure,
    load_figures_of,
    saturation_figures,
)
from moe_app.analyze.static_figures import draw_static
from moe_app.analyze.tables import write_tables
from moe_app.analyze.word_figures import similarity_figures, vocabulary_figures
from moe_app.infer.open_model import positive

Figures = list[PanelGrid | Flow]
_MOST_RECORDS = 400


@dataclass(frozen=True, kw_only=True)
class Step:
    """Describes one measure."""

    name: str
    title: str
    summary: str
    """For --help."""
    meaning: str
    """What the measure says, in a sentence or two."""
    run: Callable[[Sequence[Collection], argparse.Namespace], tuple[Measured, Figures]]
    add_flags: Callable[[argparse.ArgumentParser], None]


def run_step(args: argparse.Namespace, step: Step) -> None:
    """Write tables and figures of one measure.

    Raises:
        UserError: an input cannot be used, or the output cannot be written.
    """
    collections = open_collections(args)
    measured, figures = step.run(collections, args)
    output = Path(args.output)
    write_tables(output, measured.tables)
    draw_static(output, figures)
    for table in measured.tables:
        print(printable(f"{output / table.name}.csv: {len(table):,} rows"))
    for figure in figures:
        print(printable(f"{output / figure.name}.png and .svg"))


def open_collections(args: argparse.Namespace) -> list[Collection]:
    """Open the inputs.

    Raises:
        DataError: one is no complete collection.
    """
    return [Collection(Path(path)) for path in args.input]


def latest(collections: Sequence[Collection]) -> Collection:
    """Return the collection of the most iterations."""
    return max(collections, key=lambda each: each.manifest.iteration)


def _only(collections: Sequence[Collection]) -> Collection:
    if len(collections) > 1:
        raise ConfigError(
            f"--input names {len(collections)} collections; this measure is of one; give one, or"
            " use `report`, which takes the last of them"
        )
    return collections[0]


def _saturation(
    collections: Sequence[Collection], args: argparse.Namespace
) -> tuple[Measured, Figures]:
    measured = measure_saturation(collections)
    return measured, [*saturation_figures(measured, latest(collections).kinds())]


def _coactivation(
    collections: Sequence[Collection], args: argparse.Namespace
) -> tuple[Measured, Figures]:
    collection = _only(collections)
    measured = measure_coactivation(collection, num_strongest=args.strongest)
    return measured, [*coactivation_figures(measured, collection)]


def _domains(
    collections: Sequence[Collection], args: argparse.Namespace
) -> tuple[Measured, Figures]:
    collection = _only(collections)
    measured = measure_domains(collection)
    return measured, domain_figures(measured, collection)


def _vocabulary(
    collections: Sequence[Collection], args: argparse.Namespace
) -> tuple[Measured, Figures]:
    collection = _only(collections)
    measured = measure_vocabulary(collection, min_count=args.min_count, experts=args.experts)
    return measured, [*vocabulary_figures(measured, collection)]


def _load(collections: Sequence[Collection], args: argparse.Namespace) -> tuple[Measured, Figures]:
    collection = _only(collections)
    measured = measure_load(collection)
    figures: Figures = [*load_figures_of(measured, collection)]
    if args.run_directory is not None:
        figures += _history(Path(args.run_directory), args.history_layer)
    elif args.history_layer is not None:
        raise ConfigError(
            f"--history-layer {args.history_layer} is of a run's records; name the run's --save"
            " directory with --run, or leave the flag out"
        )
    return measured, figures


def _history(run: Path, layer: int | None) -> Figures:
    """Draw figure 10 from a run's records; without a layer, of the first that has experts.

    Raises:
        ConfigError: it has none, or no such layer.
    """
    records, _ = sample_records(run / LOAD_NAME, _MOST_RECORDS)
    there = [
        number
        for number in range(max((_num_layers(record) for record in records), default=0))
        if any(_has_layer(record, key, number) for record in records for key in LOAD_TITLES)
    ]
    layer = (there or [0])[0] if layer is None else layer
    figures: Figures = []
    for key in LOAD_TITLES:
        mine = [record for record in records if _has_layer(record, key, layer)]
        if mine:
            width = len(mine[-1][key][layer])
            same = [record for record in mine if len(record[key][layer]) == width]
            figures.append(history_figure(same, key, layer))
    if not figures:
        known = (
            f"it has layers {', '.join(map(str, there))}" if there else "it has none of any layer"
        )
        raise ConfigError(
            f"{run / LOAD_NAME} has no record of layer {layer}: {known}; --run names the --save"
            " directory of a run with experts, and --history-layer a layer of it, counted from 0"
        )
    return figures


def _num_layers(record: dict[str, object]) -> int:
    layers = [record.get(key) for key in LOAD_TITLES]
    return max((len(each) for each in layers if isinstance(each, list)), default=0)


def _has_layer(record: dict[str, object], key: str, layer: int) -> bool:
    """Return whether a record, which may be anyone's, has numbers for a layer's experts."""
    layers = record.get(key)
    if not isinstance(layers, list) or layer >= len(layers):
        return False
    row = layers[layer]
    return isinstance(row, list) and bool(row) and all(isinstance(x, int | float) for x in row)


def _similarity(
    collections: Sequence[Collection], args: argparse.Namespace
) -> tuple[Measured, Figures]:
    collection = _only(collections)
    place = None if args.weights is None else Path(args.weights)
    measured = measure_similarity(collection, weights=place, may_lack=args.may_lack_weights)
    return measured, [*similarity_figures(measured, collection)]


def counted_from_0(text: str) -> int:
    """Parse a layer's or an expert's number, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 0")
    return int(text)


def _no_flags(parser: argparse.ArgumentParser) -> None:
    pass


def _coactivation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strongest",
        type=positive,
        default=16,
        metavar="N",
        help="draw the experts of the strongest pairs, so many (%(default)s)",
    )


def _vocabulary_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-count",
        type=positive,
        default=10,
        metavar="N",
        help="leave out ids with fewer occurrences (%(default)s)",
    )
    parser.add_argument(
        "--experts",
        type=counted_from_0,
        nargs="+",
        metavar="E",
        help="of the histograms by domain; without it 0, 4 and 7, as far as there are so many",
    )


def _load_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run",
        dest="run_directory",
        metavar="DIR",
        help="a run's --save directory: draw its experts' shares over training, too",
    )
    parser.add_argument(
        "--history-layer",
        type=counted_from_0,
        metavar="L",
        help="of the run's records, counted from 0 (the first with experts)",
    )


def _similarity_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        metavar="DIR",
        help="where the checkpoint is now: an iter_... directory, or a Hugging Face one",
    )
    parser.set_defaults(may_lack_weights=False)


STEPS = (
    Step(
        name="saturation",
        title="Router saturation",
        summary="how early routers settled; over the checkpoints of a run",
        meaning="How much of the final routing a checkpoint has already.",
        run=_saturation,
        add_flags=_no_flags,
    ),
    Step(
        name="coactivation",
        title="Expert co-activation",
        summary="which experts are chosen together",
        meaning="Which experts serve the same tokens, and might be one.",
        run=_coactivation,
        add_flags=_coactivation_flags,
    ),
    Step(
        name="domains",
        title="Domain specialization",
        summary="which experts serve which text",
        meaning="Whether experts belong to kinds of text.",
        run=_domains,
        add_flags=_no_flags,
    ),
    Step(
        name="vocabulary",
        title="Vocabulary specialization",
        summary="which experts serve which tokens",
        meaning="Whether experts belong to tokens: read, predicted, or to come.",
        run=_vocabulary,
        add_flags=_vocabulary_flags,
    ),
    Step(
        name="load",
        title="Expert load",
        summary="how evenly experts are used",
        meaning="How evenly experts are used, by each kind of text.",
        run=_load,
        add_flags=_load_flags,
    ),
    Step(
        name="similarity",
        title="Similarity",
        summary="how alike experts' weights are",
        meaning="How alike experts' weights are, and whether the two kinds of router agree.",
        run=_similarity,
        add_flags=_similarity_flags,
    ),
)
"""The measures, in the order of the page."""
