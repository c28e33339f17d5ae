"""Two ranks begin a run while one has an outdated view of the files: both do what rank 0 sees.

Without rank 0's word they would part ways, one into a collective that the other never joins.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.trainer.data.writer import TokenFileWriter
from tests.distributed.launcher import HERE, flags, ranks, run_cases

TRUNK = {"lr-warmup-iters": 2, "lr-warmup-init": 0.0003, "lr-decay-style": "constant"}
SMALL = {"num-layers": 2, "global-batch-size": 4}
BRANCH = {
    **SMALL,
    **TRUNK,
    "lr-decay-style": "WSD",
    "lr-wsd-decay-style": "geometric",
    "lr-wsd-decay-iters": 3,
    "anneal-from": 2,
}
RUN = {**TRUNK, **SMALL, "train-iters": 4, "save-interval": 2, "eval-interval": 4}
BOTH = ("iter_0000002", "iter_0000004")
NEWEST = BOTH[1:]
EVERYTHING = (
    *BOTH,
    "iter_0000005",
    "latest_checkpointed_iteration.txt",
    "metrics.jsonl",
    "events.jsonl",
)


def case(flags: list[str], victim: int, hidden: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {"flags": flags, "victim": victim, "hidden": hidden, **more}


def two_sources(root: Path, second: str) -> list[str]:
    return flags(data_path=f"1 one={root}/c/web 1 two={root}/{second}/web")


def cases(root: Path) -> dict[str, dict[str, Any]]:
    """By name; where nothing else is said, names are missing in the listing of root/run."""
    run, branch = root / "run", root / "branch"
    resumed = flags(**RUN, load=run, save=run)
    fresh = flags(**RUN, save=run)
    branched = flags(**BRANCH, load=run, save=branch)
    rewinding = [*resumed, "--rewind-on-spike"]
    newest: dict[str, Any] = {"directory": str(run / NEWEST[0]), "view": "all"}
    in_branch: dict[str, Any] = {"directory": str(branch)}
    read_by_rank0 = ("config.yaml", "run.json", "manifest.json")
    other = ["--lr", "0.25", "--eval-iters", "2"]
    return {
        "resume_rank1_lists_nothing": case(resumed, 1, BOTH),
        "resume_rank1_lists_the_older": case(resumed, 1, NEWEST),
        "resume_rank0_lists_the_older": case(resumed, 0, NEWEST),
        "resume_rank0_lists_nothing": case(resumed, 0, BOTH),
        "resume_rank1_reads_nothing": case(resumed, 1, BOTH, view="all"),
        "resume_rank1_reads_the_older": case(resumed, 1, NEWEST, view="all"),
        "resume_rank1_lacks_what_rank0_reads": case(resumed, 1, read_by_rank0, **newest),
        "resume_rank1_lacks_what_it_must_read": case(resumed, 1, (".metadata",), **newest),
        "fresh_rank1_sees_nothing": case(fresh, 1, EVERYTHING, view="all"),
        "fresh_rank0_sees_nothing": case(fresh, 0, EVERYTHING, view="all"),
        "branch_rank1_lists_nothing": case(branched, 1, ("iter_0000005",), **in_branch),
        "branch_rank0_sees_nothing": case(branched, 0, EVERYTHING, **in_branch, view="all"),
        "rewind_rank1_lists_nothing": case(rewinding, 1, BOTH, rewind=4),
        "rewind_rank0_lists_the_older": case(rewinding, 0, NEWEST, rewind=4),
        "other_data": case(
            flags(data_path=root / "a" / "web"), 1, (), other_data=str(root / "b" / "web")
        ),
        "other_content": case(
            flags(data_path=root / "a" / "web"), 1, (), other_data=str(root / "c" / "web")
        ),
        "same_data": case(two_sources(root, "a"), 1, (), counts_reads=True),
        "copied_data": case(
            flags(data_path=root / "a" / "web"),
            1,
            (),
            other_data=str(root / "copy" / "web"),
            counts_reads=True,
        ),
        "damaged_data": case(two_sources(root, "damaged"), 1, ()),
        "other_settings": case(resumed, 1, (), more_flags=other),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What both ranks found alike, by case."""
    root = tmp_path_factory.mktemp("stale")
    before = {
        "run": flags(**RUN, save=root / "run"),
        "branch": flags(**BRANCH, load=root / "run", save=root / "branch"),
    }
    run_cases(2, before, root / "before")
    for directory, num_tokens, first in (
        ("a", 400, 0),
        ("b", 500, 0),
        ("c", 400, 1),
        ("copy", 400, 0),
    ):
        with TokenFileWriter(str(root / directory / "web"), vocab_size=120) as writer:
            writer.add_document(np.arange(first, first + num_tokens) % 120)
            writer.finish()
    shutil.copytree(root / "b", root / "damaged")
    with open(root / "damaged" / "web.bin", "ab") as file:
        file.write(b"x")
    listing = [
        {"name": name, "directory": str(root / "run"), "view": "listing", **case}
        for name, case in cases(root).items()
    ]
    (root / "cases.json").write_text(json.dumps(listing))
    arguments = (str(root / "cases.json"), str(root))
    done = ranks(2, HERE / "worker_stale.py", *arguments, timeout=400)
    assert done.returncode == 0, done.stderr[-5000:]
    outcomes = {}
    for case in listing:
        each = [json.loads((root / f"{case['name']}.rank{r}.json").read_text()) for r in range(2)]
        assert each[0] == each[1], case["name"]
        outcomes[case["name"]] = {
            key: value.replace(str(root), "") if isinstance(value, str) else value
            for key, value in each[0].items()
        }
    return outcomes


def begun(event: str, iteration: int, *, pending: bool = False, **more: Any) -> dict[str, Any]:
    return {"event": event, "iteration": iteration, "pending": pending, **more}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resume_rank1_lists_nothing", begun("resume", 4)),
        ("resume_rank1_lists_the_older", begun("resume", 4)),
        ("resume_rank0_lists_the_older", begun("resume", 2)),
        ("resume_rank0_lists_nothing", begun("start", 0)),
        ("resume_rank1_lacks_what_rank0_reads", begun("resume", 4)),
        ("fresh_rank0_sees_nothing", begun("start", 0)),
        ("branch_rank1_lists_nothing", begun("resume", 5)),
        ("branch_rank0_sees_nothing", begun("branch", 2)),
        ("rewind_rank1_lists_nothing", begun("resume", 4, rewound=True)),
        ("rewind_rank0_lists_the_older", begun("resume", 2, rewound=True)),
        ("same_data", begun("start", 0, reads=[1, 1])),  # of two files, one each
        ("copied_data", begun("start", 0, reads=[1, 1])),
    ],
)
def test_both_ranks_begin_where_rank_0_sees_a_beginning(
    name: str, expected: dict[str, Any], found: dict[str, dict[str, Any]]
) -> None:
    assert found[name] == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fresh_rank1_sees_nothing", "CheckpointError: /run holds an earlier run; continue it"),
        ("resume_rank1_reads_nothing", "CheckpointError: on rank 1: host "),
        ("resume_rank1_reads_the_older", "CheckpointError: on rank 1: host "),
        ("resume_rank1_lacks_what_it_must_read", "CheckpointError: on rank 1: host "),
        (
            "other_data",
            "DataError: data differ between ranks: train web: rank 0 {'use': 'train', 'phase':",
        ),
        (
            "other_content",
            "DataError: data differ between ranks: content of train web: rank 0 ",
        ),
        ("damaged_data", "DataError: on rank 1: /damaged/web.bin has 1001 bytes, but "),
        (
            "other_settings",
            "ConfigError: settings differ between ranks: lr: rank 0 0.003, rank 1 0.25;"
            " eval_iters: rank 0 1, rank 1 2; ",
        ),
    ],
)
def test_what_cannot_be_done_on_one_rank_is_refused_by_both(
    name: str, message: str, found: dict[str, dict[str, Any]]
) -> None:
    assert found[name]["error"].startswith(message)
