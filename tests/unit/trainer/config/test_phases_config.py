"""Tests lengths, phases and branches from recipe and flags: their meaning, and what is rejected."""

import re
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.schedule_lengths import describe_lengths
from megatron.trainer.config.schema import PhaseConfig
from megatron.trainer.config.validate import validate
from megatron.trainer.data.build import build_data
from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.errors import ConfigError
from megatron.trainer.optim.schedules import build_schedule
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_app.pretrain.describe import data_lines

# Eight sequences of sixteen tokens: 128 tokens a step.
BASE = {"global_batch_size": 8, "seq_length": 16, "vocab_size": 120}
PHASES = """
phases:
- {name: stable, train_tokens: 1_000, data_path: [0.7, web, 0.3, code]}
- name: decay
  train_tokens: 250
  data_path: [web]
"""


def parse(tmp_path: Path, text: str = "", *flags: str) -> PretrainConfig:
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in BASE.items()) + text)
    return parse_recipe(["--config", str(path), *flags], prog="test", description="")


def problems(cfg: PretrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(cfg, 1)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "flags", "steps"),
    [
        ("train_tokens: 1280", (), 10),
        ("train_tokens: 1281", (), 11),
        ("", ("--train-tokens", "1"), 1),
        ("train_iters: 7", ("--train-tokens", "1280"), 10),
        ("train_tokens: 1280", ("--train-iters", "7"), 7),
        ("train_iters: 10\ntrain_tokens: 1280", (), 10),
        (PHASES, (), 10),
        ("", (), 100),
    ],
)
def test_length_set_last_wins_and_is_in_whole_steps(
    tmp_path: Path, text: str, flags: tuple[str, ...], steps: int
) -> None:
    cfg = parse(tmp_path, text, *flags)
    assert cfg.training.train_iters == steps
    assert cfg.training.train_tokens in (None, steps * 128, 1281, 1)
    validate(cfg, 1)


def test_schedule_lengths_in_tokens_are_exact_and_counted_in_whole_steps(tmp_path: Path) -> None:
    text = (
        "train_tokens: 128_000\nlr_warmup_tokens: 1_300\nlr_decay_tokens: 127_999\n"
        "lr_wsd_decay_tokens: 12_800\nlr_decay_style: WSD\nlr_wsd_decay_style: linear\n"
    )
    cfg = parse(tmp_path, text)
    validate(cfg, 1)
    optimizer = cfg.optimizer
    assert cfg.training.train_iters == 1000
    assert (optimizer.lr_warmup_iters, optimizer.lr_decay_iters) == (11, 1000)
    assert optimizer.lr_wsd_decay_iters == 100
    assert describe_lengths(cfg) == [
        "length: 1,000 steps of 128 tokens = 128,000 tokens",
        "end: with the first step at or past 128,000 tokens, whatever the batch until then",
        "learning rate: a function of the tokens consumed: lr_warmup_tokens 1,300, lr_decay_tokens"
        " 127,999, lr_wsd_decay_tokens 12,800",
    ]
    schedule = build_schedule(cfg)
    assert schedule(1_299) < schedule(1_300) == schedule(115_199) == optimizer.lr
    assert schedule(115_200) < optimizer.lr
    # A flag in the other spelling wins over the recipe's.
    assert parse(tmp_path, text, "--lr-wsd-decay-iters", "7").optimizer.lr_wsd_decay_iters == 7


def test_two_spellings_that_disagree_are_refused(tmp_path: Path) -> None:
    cfg = parse(tmp_path, "train_iters: 9\ntrain_tokens: 1280\n")
    assert problems(cfg) == (
        "train_tokens (1,280) is 10 steps of global_batch_size x seq_length = 128 tokens, but"
        " train_iters is 9; they are two spellings of one length; set one of them"
    )
    cfg = parse(tmp_path, "", "--lr-warmup-tokens", "0")
    assert problems(cfg) == "lr_warmup_tokens (0) must be at least 1; use 1 or more"


def test_phases_are_read_printed_and_read_again(tmp_path: Path) -> None:
    cfg = parse(tmp_path, PHASES)
    assert cfg.data.phases == (
        PhaseConfig(name="stable", train_tokens=1000, data_path=("0.7", "web", "0.3", "code")),
        PhaseConfig(name="decay", train_tokens=250, data_path=("web",)),
    )
    validate(cfg, 1)
    printed = tmp_path / "printed.yaml"
    printed.write_text(dump_config(cfg))
    again = parse_recipe(["--config", str(printed)], prog="test", description="")
    assert again == cfg
    assert describe_lengths(cfg) == [
        "length: 10 steps of 128 tokens = 1,280 tokens",
        "end: with the first step at or past 1,264 tokens, whatever the batch until then",
        "learning rate: a function of the tokens consumed: lr_decay_tokens 1,264",
        "phase stable: 1,000 tokens: 63 sequences = 7.875 steps",
        "phase decay: 250 tokens: 16 sequences = 2 steps",
    ]


def test_mixture_given_last_wins(tmp_path: Path) -> None:
    cfg = parse(tmp_path, PHASES + "train_iters: 10\n", "--data-path", "web")
    assert (cfg.data.phases, cfg.data.data_path) == ((), ("web",))
    validate(cfg, 1)


def test_mock_data_overrides_phases(tmp_path: Path) -> None:
    cfg = parse(tmp_path, PHASES, "--mock-data", "--train-iters", "3")
    validate(cfg, 1)
    assert cfg.training.train_iters == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "phases:\n- {name: a, train_token: 5, data_path: [x]}\n",
            "unknown key 'train_token' of phases[1] in FILE:5; did you mean 'train_tokens'?",
        ),
        (
            "phases:\n- {name: a, weight: 5, data_path: [x]}\n",
            "unknown key 'weight' of phases[1] in FILE:5; it takes name, train_tokens, data_path",
        ),
        (
            "phases:\n- {name: a, data_path: [x], train_tokens: 8}\n- {name: b, data_path: [x]}\n",
            "phases[2] in FILE:6 lacks train_tokens; each needs name, train_tokens, data_path",
        ),
        (
            "phases:\n- {name: a, name: b}\n",
            "key 'name' of phases[1] is set a second time in FILE:5; keep one of them",
        ),
        (
            "phases:\n- {name: a, train_tokens: many, data_path: [x]}\n",
            "key 'phases[1].train_tokens' in FILE:5 must be an integer, not 'many'",
        ),
        ("phases: [a]\n", "phases[1] in FILE:4 must be a mapping, not 'a'"),
        (
            "phases: 3\n",
            "key 'phases' in FILE:4 must be a list of mappings (name, train_tokens, data_path), not"
            " '3'",
        ),
        (
            "phases:\n- {name: !!python/name:os.x '', train_tokens: 1, data_path: [x]}\n",
            "key 'phases[1].name' in FILE:5 has the tag 'tag:yaml.org,2002:python/name:os.x';"
            " recipes take no tags, remove it",
        ),
    ],
)
def test_malformed_phases_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, text)
    assert str(caught.value) == message.replace("FILE", str(tmp_path / "recipe.yaml"))


def test_phases_are_not_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(tmp_path, "", "--phases", "x")
    assert "--phases is not a flag: phases can be set in a recipe only" in capsys.readouterr().err


COVER = (
    "the phases have 10 steps (stable 8 + decay 2, of 128 tokens each), but {}; they must cover it"
    " exactly; {}"
)
OF_RUN = "change a phase's train_tokens, or leave the length to the phases"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            PHASES + "train_iters: 11\n",
            COVER.format("train_iters (11) is the length of the run", OF_RUN),
        ),
        (
            PHASES + "train_tokens: 1_000\n",
            COVER.format("train_iters (8) is the length of the run", OF_RUN),
        ),
        (
            PHASES + "data_path: [web]\n",
            "phases (stable, decay) and data_path (web) are both set; a run has either; give each"
            " phase its data_path and drop the other",
        ),
        (
            PHASES.replace("decay", "stable"),
            "phases have the names 'stable', 'stable'; each must have one of its own; rename them",
        ),
        (
            PHASES.replace("250", "0"),
            "train_tokens (0) of phase 'decay' must be at least 1; give it tokens, or leave the"
            " phase out",
        ),
        (
            PHASES.replace("[web]", "[]"),
            "data_path of phase 'decay' is empty; a phase needs a source; name a token file's"
            " PREFIX, or WEIGHT PREFIX pairs",
        ),
    ],
)
def test_inconsistent_phases_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert problems(parse(tmp_path, text)) == message


BRANCH = (
    "lr_wsd_decay_style: linear\nlr_wsd_decay_tokens: 1_280\nanneal_from: 50\nload: trunk\n"
    "save: branch\nmin_lr: 0\n"
)


def test_branch_ends_with_its_tail_whatever_the_trunks_recipe_says(tmp_path: Path) -> None:
    trunk = "train_iters: 50\nlr_warmup_iters: 49\ndata_path: [web]\n"
    flags = ("--anneal-from", "50", "--lr-wsd-decay-style", "linear", "--load", "trunk")
    cfg = parse(tmp_path, trunk, *flags, "--lr-wsd-decay-iters", "10")
    assert cfg.training.train_iters == 60
    validate(cfg, 1)
    printed = tmp_path / "printed.yaml"
    printed.write_text(dump_config(cfg))
    again = parse_recipe(["--config", str(printed)], prog="test", description="")
    assert again == cfg
    validate(again, 1)
    assert describe_lengths(cfg)[0] == (
        "length: 10 steps of 128 tokens = 1,280 tokens, after the 50 steps of the run it branches"
        " from"
    )


def test_branch_may_have_phases_that_cover_its_tail(tmp_path: Path) -> None:
    cfg = parse(tmp_path, BRANCH + PHASES)
    assert cfg.training.train_iters == 60
    validate(cfg, 1)
    longer = parse(tmp_path, BRANCH.replace("1_280", "1_281") + PHASES)
    assert problems(longer) == COVER.format(
        "lr_wsd_decay_iters (11) is the length of the branch",
        "give the branch its own phases, or one mixture with --data-path",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("load: trunk", "load: null"),
            "anneal_from (50) needs load (None), the directory of the run to branch from; set"
            " --load DIR",
        ),
        (
            ("lr_wsd_decay_style: linear", ""),
            "anneal_from needs lr_wsd_decay_style (None), the shape of the branch's tail; use"
            " linear or geometric, for example",
        ),
        (
            ("lr_wsd_decay_tokens: 1_280", ""),
            "anneal_from needs lr_wsd_decay_iters (None) of at least 1, the length of the branch;"
            " give it in steps, or in tokens as lr_wsd_decay_tokens",
        ),
        (
            ("min_lr: 0", "train_iters: 50"),
            "train_iters (50) must be anneal_from + lr_wsd_decay_iters (50 + 10 = 60), because a"
            " branch ends with its tail; leave --train-iters out",
        ),
        (
            ("min_lr: 0", "finetune: true"),
            "anneal_from (50) takes optimizer and learning rate with the weights, finetune (True)"
            " takes the weights alone; drop one of them",
        ),
        (
            ("anneal_from: 50", "anneal_from: -1"),
            "anneal_from (-1) must be at least 0; use an iteration of the trunk",
        ),
    ],
)
def test_impossible_branch_is_refused(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    assert problems(parse(tmp_path, BRANCH.replace(*change))) == message


def test_wsd_without_its_parts_is_refused(tmp_path: Path) -> None:
    cfg = parse(tmp_path, "", "--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "5")
    with pytest.raises(ConfigError, match=r"^lr_decay_style WSD needs lr_wsd_decay_style"):
        build_schedule(cfg)
    cfg = parse(tmp_path, "", "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear")
    with pytest.raises(ConfigError, match=r"^lr_wsd_decay_iters \(0\) must be 1 to 100"):
        build_schedule(cfg)
    cfg = parse(tmp_path, BRANCH.replace("linear", "geometric"))
    with pytest.raises(ConfigError, match=r"^lr_wsd_decay_style 'geometric' goes from"):
        build_schedule(cfg)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write three token files: web of 30 windows, code of 20, and another code."""
    monkeypatch.chdir(tmp_path)
    for name, windows in (("web", 30), ("code", 20), ("old/code", 20)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with TokenFileWriter(name, vocab_size=120) as writer:
            writer.add_document([index % 120 for index in range(windows * 16 + 1)])
            writer.finish()
    return tmp_path


def bundle(tmp_path: Path, text: str) -> tuple[PretrainConfig, Any]:
    cfg = parse(tmp_path, text)
    validate(cfg, 1)
    return cfg, build_data(cfg.data, vocab_size=120, seq_length=16, seed=1, samples_per_step=8)


def test_table_names_every_phase_and_a_short_source(files: Path) -> None:
    cfg, data = bundle(files, PHASES)
    assert [(phase.name, phase.sources, phase.num_samples) for phase in data.train.phases] == [
        ("stable", ("web", "code"), 63),
        ("decay", ("web",), 16),
    ]
    table, warnings = data_lines(cfg, data)
    assert table == [
        "train data stable, web: weight 0.7, 1 documents, 481 tokens, 30 sequences, 706 tokens to"
        " be drawn, 1.47 epochs",
        "train data stable, code: weight 0.3, 1 documents, 321 tokens, 20 sequences, 302 tokens to"
        " be drawn, 0.945 epochs",
        "train data decay, web: weight 1, 1 documents, 481 tokens, 30 sequences, 256 tokens to be"
        " drawn, 0.533 epochs",
    ]
    assert warnings == [
        "source web is shorter than its budget: the run draws it 2 times over (stable 1.47,"
        " decay 0.533)"
    ]


def test_source_keeps_its_name_where_one_is_given(files: Path) -> None:
    """Moves a file and adds another one with the same stem; the source keeps its name."""
    _, plain = bundle(files, "data_path: [1, web, 1, code]\n")
    text = "data_path: [1, web, 1, code=old/code, 1, new=code]\n"
    _, named = bundle(files, text)
    assert [source.name for source in plain.train.sources] == ["web", "code"]
    assert [source.name for source in named.train.sources] == ["web", "code", "new"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data_path: [1, a=web, 1, a=code]\n",
            "--data-path has a=web and a=code, one name for two sources; a source has one file and"
            " one name in all phases; write the same NAME=PREFIX in every phase",
        ),
        (
            PHASES.replace("[web]", "[w=web]"),
            "--data-path has web and w=web, one file for two sources; a source has one file and one"
            " name in all phases; write the same NAME=PREFIX in every phase",
        ),
        (
            PHASES.replace("0.3, code", "0, code"),
            "data_path of phase 'stable' has '0' where a weight belongs (0.7 web 0 code); data_path"
            " of phase 'stable' must be one PREFIX, or WEIGHT PREFIX pairs with weights > 0; give"
            " each file a weight, or leave it out",
        ),
        (
            PHASES.replace("0.3, code", "-0.3, code"),
            "data_path of phase 'stable' has '-0.3' where a weight belongs (0.7 web -0.3 code);"
            " data_path of phase 'stable' must be one PREFIX, or WEIGHT PREFIX pairs with weights >"
            " 0; give each file a weight, or leave it out",
        ),
        (
            PHASES.replace("0.3, code", "0.3, web"),
            "data_path of phase 'stable' names web 2 times; each file must be named once; add up"
            " its weights",
        ),
    ],
)
def test_invalid_mixture_is_refused(files: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        bundle(files, text)
