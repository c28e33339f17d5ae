"""Writes the report of a sweep: tables, figures and one page, all from the tables of its runs."""

import base64
import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron.trainer.errors import ConfigError
from megatron.trainer.io.atomic_write import write_bytes, write_text
from megatron.trainer.records.history import duration
from megatron.trainer.records.run_dir import read_ended
from moe_app.ablate.sign_tables import EqualLoss, Pair, compare, equal_losses, metric_name, pairs_of
from moe_app.ablate.studies_file import NONE, RATIOS, TASK, Study, Sweep
from moe_app.ablate.study_figures import draw_study
from moe_app.ablate.sweep_jobs import SweepJob
from moe_app.ablate.sweep_tables import Trained, csv_text, measure, read_tables, write_tables
from moe_app.view.page_parts import escaped, html_table, page_head

PAGE_NAME = "index.html"
SIGNS_HEAD = (
    *("study", "better", "other", "metric", "decides", "published", "ours", "standard_error"),
    *("seeds", "confidence", "p_one_sided", "spread", "verdict", "left_out"),
)
EQUAL_HEAD = (
    *("study", "run", "other", "seed", "metric", "loss", "tokens"),
    *RATIOS,
)
_SHOWN_HEAD = ("study", "better", "other", "by", "published", "here", "seeds", "sure", "verdict")


def report_directory(output: Path) -> Path:
    """Return where the report of a sweep goes."""
    return output / "report"


def write_report(sweep: Sweep, jobs: Sequence[SweepJob], output: Path) -> Path:
    """Write the report of the finished runs; return its page.

    Without runs, as in what `--export` wrote, it is made of the tables that are there.

    Raises:
        ConfigError: there are neither, or it cannot be written.
    """
    directory = report_directory(output)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(job.state == "finished" for job in jobs):
            write_tables(directory, measure_all([job for job in jobs if _has_ended(job)]))
        runs = read_tables(directory)
        _write(sweep, runs, directory)
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {directory}: {error.strerror or error}; give an"
            " --output that can be written to"
        ) from error
    return directory / PAGE_NAME


def measure_all(jobs: Sequence[SweepJob]) -> list[Trained]:
    """Read the records of finished and failed runs, those that others branch from first."""
    found: dict[Path, Trained] = {}
    for job in jobs:
        trunk = found.get(job.source) if job.source and job.run.anneal_from else None
        found[job.directory] = measure(job, trunk)
    return list(found.values())


def _has_ended(job: SweepJob) -> bool:
    """Return whether a run is finished, or ended by an error after steps of its own."""
    if job.state == "finished":
        return True
    ended = read_ended(job.directory)
    return ended is not None and ended.reason == "error" and job.iteration > 0


def _write(sweep: Sweep, runs: Sequence[Trained], directory: Path) -> None:
    pairs = {study.name: compare(study, runs) for study in sweep.studies}
    equals = {study.name: equal_losses(study, runs) for study in sweep.studies}
    images: dict[str, bytes] = {}
    for study in sweep.studies:
        image = draw_study(study, runs)
        if image is not None:
            images[study.name] = image
            write_bytes(directory / f"{study.name}.png", image)
    every = [pair for each in pairs.values() for pair in each]
    write_text(directory / "signs.csv", csv_text(SIGNS_HEAD, map(_sign_line, every)))
    write_text(
        directory / "equal_loss.csv",
        csv_text(EQUAL_HEAD, (_equal_line(one) for each in equals.values() for one in each)),
    )
    write_text(directory / "signs.md", _markdown(sweep, runs, pairs, equals))
    page = _page(sweep, runs, pairs, equals, images)
    write_text(directory / PAGE_NAME, page, errors="replace")


def _sign_line(pair: Pair) -> list[object]:
    confidence = pair.confidence
    return [
        *(pair.study, pair.first, pair.other, pair.metric, "yes" if pair.decides else "no"),
        *(_plain(pair.published), _plain(pair.mean), _plain(pair.error), len(pair.differences)),
        *(_plain(confidence), _plain(None if confidence is None else 1 - confidence)),
        *(_plain(pair.spread), pair.verdict, "; ".join(pair.left_out)),
    ]


def _equal_line(one: EqualLoss) -> list[object]:
    return [
        *(one.study, one.first, one.other, one.seed, one.metric, _plain(one.loss)),
        "" if one.tokens is None else f"{one.tokens:.0f}",
        *(_plain(each) for each in (one.tokens_ratio, one.flops_ratio, one.seconds_ratio)),
    ]


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _cells(study: Study, pair: Pair) -> list[str]:
    """Return a pair as the tables for readers show it."""
    form = "+.4f"
    error = "" if pair.error is None else f" ± {pair.error:.4f}"
    published = "-" if pair.published is None else format(pair.published, form)
    if study.better == NONE:
        published = "no difference" if pair.published is None else f"{published} (none)"
    return [
        study.title,
        study.runs[pair.first],
        study.runs[pair.other],
        pair.metric,
        published,
        f"{pair.mean:{form}}{error}",
        str(len(pair.differences)) + (f" ({len(pair.left_out)} left out)" if pair.left_out else ""),
        "-" if pair.confidence is None else f"{pair.confidence:.1%}",
        pair.verdict,
    ]


def _ratio_cells(study: Study, equals: Sequence[EqualLoss]) -> list[list[str]]:
    """Return a line for each pair: how many times fewer tokens, FLOPs and seconds it needs."""
    lines = []
    for other in dict.fromkeys(one.other for one in equals):
        of_pair = [one for one in equals if one.other == other]
        reached = [one for one in of_pair if one.tokens is not None]
        cells = []
        for key in RATIOS:
            known = [value for one in reached if (value := getattr(one, key)) is not None]
            cell = "-"
            if known:
                cell = f"{statistics.fmean(known):.2f} ({min(known):.2f} to {max(known):.2f})"
            if key in study.published:
                cell += f"; published {study.published[key]['']:g}"
            cells.append(cell)
        first = study.runs[of_pair[0].first]
        count = f"{len(reached)} of {len(of_pair)}"
        lines.append([study.title, first, study.runs[other], of_pair[0].metric, *cells, count])
    return lines


_RATIO_HEAD = ("study", "run", "has the loss of", "by", "tokens", "FLOPs", "seconds", "seeds")


def _counts(sweep: Sweep, pairs: dict[str, list[Pair]]) -> str:
    """Say how many of the deciding comparisons agree."""
    verdicts: list[str] = [
        pair.verdict for study in sweep.studies for pair in pairs[study.name] if pair.decides
    ]
    kinds = ("agrees", "disagrees", "undecided")
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in kinds)
    left = [name for study in sweep.studies for name in _without_results(study, pairs[study.name])]
    return f"{counts}; without results of both runs: {', '.join(left)}" if left else counts


def _without_results(study: Study, pairs: Sequence[Pair]) -> list[str]:
    """Name the deciding comparisons of a study that cannot be made, or the study if all cannot."""
    done = {pair.other for pair in pairs if pair.decides}
    wanted = pairs_of(study)
    if not done:
        return [f"{study.title} ({study.metric})"]
    return [
        f"{study.title}, {study.runs[other]} beside {study.runs[first]} ({study.metric})"
        for first, other in wanted
        if other not in done
    ]


def _faults(sweep: Sweep, runs: Sequence[Trained]) -> str:
    """Name the runs that diverged or failed, seed by seed; empty if none did."""
    told = [
        f"{run.run} seed {run.seed} ({run.faults})"
        for name in sweep.runs
        for run in runs
        if run.run == name and run.faults
    ]
    return f" Not as it should be: {', '.join(told)}." if told else ""


def _markdown(
    sweep: Sweep,
    runs: Sequence[Trained],
    pairs: dict[str, list[Pair]],
    equals: dict[str, list[EqualLoss]],
) -> str:
    def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
        rows = [head, ["---"] * len(head), *lines]
        return ["| " + " | ".join(each.replace("|", r"\|") for each in row) + " |" for row in rows]

    deciding, others, ratios = _table_lines(sweep, pairs, equals)
    parts = [
        "# Signs",
        "",
        f"{_counts(sweep, pairs)}.{_faults(sweep, runs)} {_EXPLAINED}",
        "",
        *table(_SHOWN_HEAD, deciding),
        *("", "## By other metrics", ""),
        *table(_SHOWN_HEAD, others),
        *("", "## The way to an equal loss", "", _RATIOS_EXPLAINED, ""),
        *table(_RATIO_HEAD, ratios),
    ]
    return "\n".join(parts) + "\n"


_EXPLAINED = (
    "A difference is the advantage of the run called better: how much lower its loss, or higher its"
    " accuracy, is; here the mean over seeds, each run beside the other under the same seed, and"
    " its standard error. Sure is how sure the sign here is, of a paired t test; below 90 % a sign"
    " is undecided. No difference agrees if the mean is within one standard deviation over seeds."
)
_RATIOS_EXPLAINED = (
    "How many times more tokens, FLOPs and seconds of training the second run took for its final"
    " loss than the first took to reach it: the mean over the seeds that did, and their range."
)


def _table_lines(
    sweep: Sweep, pairs: dict[str, list[Pair]], equals: dict[str, list[EqualLoss]]
) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    deciding: list[list[str]] = []
    others: list[list[str]] = []
    ratios: list[list[str]] = []
    for study in sweep.studies:
        for pair in pairs[study.name]:
            (deciding if pair.decides else others).append(_cells(study, pair))
        ratios += _ratio_cells(study, equals[study.name])
    return deciding, others, ratios


def _page(
    sweep: Sweep,
    runs: Sequence[Trained],
    pairs: dict[str, list[Pair]],
    equals: dict[str, list[EqualLoss]],
    images: dict[str, bytes],
) -> str:
    seeds = sorted({run.seed for run in runs})
    have = {run.run for run in runs}
    missing = [name for name in sweep.runs if name not in have]
    deciding, _, ratios = _table_lines(sweep, pairs, equals)
    note = f" Not trained yet: {', '.join(missing)}." if missing else ""
    parts = [
        *page_head("Ablations"),
        "<body>",
        "<h1>Ablations</h1>",
        f'<p class="quiet">{escaped(f"{len(have)} runs, seeds {seeds}.{note}")}</p>',
        "<h2>Signs</h2>",
        f"<p>{escaped(f'{_counts(sweep, pairs)}.{_faults(sweep, runs)}')}</p>",
        html_table(_SHOWN_HEAD, deciding),
        f'<p class="quiet">{escaped(_EXPLAINED)}</p>',
        "<h2>The way to an equal loss</h2>",
        html_table(_RATIO_HEAD, ratios),
        f'<p class="quiet">{escaped(_RATIOS_EXPLAINED)}</p>',
    ]
    for study in sweep.studies:
        parts += _study_part(study, runs, pairs[study.name], images.get(study.name))
    parts += ["<h2>Runs</h2>", _runs_table(sweep, runs)]
    return "\n".join([*parts, "</body>", "</html>"]) + "\n"


def _study_part(
    study: Study, runs: Sequence[Trained], pairs: Sequence[Pair], image: bytes | None
) -> list[str]:
    parts = [f"<h2>{escaped(study.title)}</h2>"]
    source = f"Source: {study.source}. " if study.source else ""
    parts.append(f'<p class="quiet">{escaped(source + study.note)}</p>')
    if image is not None:
        data = base64.b64encode(image).decode("ascii")
        parts.append(
            f'<figure><img alt="{escaped(study.name)}" src="data:image/png;base64,{data}"'
            ' style="max-width:100%;background:#fff">'
            '<figcaption class="quiet">Mean over seeds, band from the lowest to the highest.'
            "</figcaption></figure>"
        )
    rows = []
    for metric in dict.fromkeys(pair.metric for pair in pairs):
        published = next(
            (values for key, values in study.published.items() if metric_name(key) == metric), {}
        )
        for name, label in study.runs.items():
            values = [run.final[metric] for run in runs if run.run == name and metric in run.final]
            rows.append(
                [
                    metric,
                    label,
                    f"{published[name]:.3f}" if name in published else "-",
                    _mean_and_spread(values, metric),
                ]
            )
    parts.append(html_table(["", "run", "published", "here, mean ± deviation over seeds"], rows))
    lines = [_cells(study, pair) for pair in pairs]
    return [*parts, html_table(_SHOWN_HEAD, lines)]


def _mean_and_spread(values: Sequence[float], metric: str) -> str:
    if not values:
        return "-"
    scale, unit = (100, " %") if metric.startswith(f"{TASK} ") else (1, "")
    digits = 1 if unit else 4
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.fmean(values):.{digits}f}{spread}{unit}"


def _runs_table(sweep: Sweep, runs: Sequence[Trained]) -> str:
    rows = [
        [
            run.run,
            str(run.seed),
            f"{run.tokens:,.0f}",
            f"{run.flops:.3g}",
            duration(run.seconds),
            f"{run.tokens / run.seconds:,.0f}" if run.seconds else "-",
            *(f"{run.final[key]:.4f}" if key in run.final else "-" for key in ("train", "valid")),
            run.faults,
        ]
        for name in sweep.runs
        for run in runs
        if run.run == name
    ]
    head = ["run", "seed", "tokens", "FLOPs", "time", "tokens/s", "train", "valid", "faults"]
    return html_table(head, rows)
