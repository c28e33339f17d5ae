"""Fine-tune and align through the commands: records, resume, and what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.trainer.config.recipe import dump_config, schema_of
from megatron.trainer.runtime.launch import shut_down
from moe_app.align import alignment
from moe_app.align.align_config import AlignConfig
from moe_app.convert import convert_checkpoint
from moe_app.finetune import finetuning
from moe_app.finetune.tuning_config import FinetuneConfig
from moe_app.pretrain import command, router_saturation
from moe_app.pretrain.config import OTHER_KEYS, PretrainConfig, read_saved_config
from tests.distributed.convert_models import make_hf
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer

# From torch when it reads a checkpoint, and from megatron-core about its embedding and loss.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]

END = "<|endoftext|>"
WORDS = ("quick", "brown", "fox", "lazy", "dog", "over", "jumps", "the")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with its tokenizer, and rows of each kind."""
    torch.utils._device._device_constructors()  # filled before factories are patched
    where = tmp_path_factory.mktemp("stages")
    hf, _ = make_hf(
        where / "hf", "olmoe", "fused", dtype=torch.float32, vocab_size=289, bos_token_id=0
    )
    make_hf_tokenizer(hf, [END], tokenizer_config={"eos_token": END, "bos_token": END})
    run = str(where / "base")
    assert convert_checkpoint.main(["import", "--hf", str(hf), "--save", run]) == 0
    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "preference": [], "kto": []}
    for number, word in enumerate(WORDS):
        prompt, bad = f"say {word}", f"no {WORDS[number - 3]} no"
        good = " ".join([word] * (1 + number % 3))
        user, right = {"role": "user", "content": prompt}, {"role": "assistant", "content": good}
        rows["sft"].append({"messages": [user, right]})
        rows["preference"].append({"prompt": prompt, "chosen": good, "rejected": bad})
        is_good = number % 2 == 0
        answer = good if is_good else bad
        rows["kto"].append({"prompt": prompt, "completion": answer, "label": is_good})
    for kind, each in rows.items():
        (where / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return where


def run(folder: Path, stage: Any, kind: str, save: Path, *more: str) -> int:
    flags = ["--load", str(folder / "base"), "--save", str(save), "--template", "olmoe"]
    flags += ["--train-data", str(folder / f"{kind}.jsonl"), "--seq-length", "64"]
    flags += ["--global-batch-size", "4", "--micro-batch-size", "2", "--lr", "1e-2"]
    flags += ["--log-interval", "1", "--device", "cpu"]
    flags += [] if "--train-epochs" in more else ["--train-iters", "4"]
    status = int(stage.main([*flags, *more]))
    if status and dist.is_initialized():  # a process that fails ends without leaving its groups
        shut_down()
    return status


def records(save: Path) -> list[dict[str, Any]]:
    """Return the records of steps, without what depends on speed."""
    lines = (save / "metrics.jsonl").read_text().splitlines()
    dropped = ("tokens_per_second", "model_tflops")
    found = [json.loads(line) for line in lines]
    return [{key: each[key] for key in each if key not in dropped} for each in found]


def test_reductions_scale_the_gradient_and_report_one_loss(folder: Path, tmp_path: Path) -> None:
    found = {}
    for reduction in ("token-mean", "sum", "sample-mean"):
        save = tmp_path / reduction
        more = ("--loss-reduction", reduction, "--no-packing", "--clip-grad", "0")
        assert run(folder, finetuning, "sft", save, *more, "--train-iters", "1") == 0
        (found[reduction],) = records(save)
    losses = {each["lm_loss"] for each in found.values()}
    assert len(losses) == 1
    norms = {name: each["grad_norm"] for name, each in found.items()}
    # The answers of this batch have so many tokens that count, end of text included.
    ratio = norms["sum"] / norms["token-mean"]
    assert ratio == pytest.approx(round(ratio), rel=1e-5) and ratio > 4
    assert norms["sample-mean"] != pytest.approx(norms["token-mean"], rel=1e-3)


@pytest.mark.usefixtures("with_pixels")
def test_dpo_begins_at_log_2_and_learns(folder: Path, tmp_path: Path) -> None:
    more = ("--method", "dpo", "--beta", "0.5", "--train-iters", "8", "--weight-decay", "0")
    assert run(folder, alignment, "preference", tmp_path, *more) == 0
    found = records(tmp_path)
    assert found[0]["dpo_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert found[0]["rewards_margin"] == pytest.approx(0.0, abs=1e-5)
    assert found[-1]["dpo_loss"] < 0.9 * found[0]["dpo_loss"]
    assert found[-1]["rewards_margin"] > 0.1
    assert (tmp_path / "plots" / "preferences.png").is_file()
    assert found[-1]["rewards_chosen"] - found[-1]["rewards_rejected"] == pytest.approx(
        found[-1]["rewards_margin"], rel=1e-4
    )


def test_a_base_without_biases_of_experts_is_the_reference_of_a_run_with(
    folder: Path, tmp_path: Path
) -> None:
    more = ("--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", "0.1")
    assert run(folder, alignment, "preference", tmp_path, *more) == 0
    first, *_, last = records(tmp_path)
    # All biases begin at 0, so that the first step finds the policy where the reference is.
    assert first["dpo_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["rewards_margin"] == pytest.approx(0.0, abs=1e-5)
    assert abs(last["rewards_margin"]) > 1e-4


def test_router_saturation_compares_tokens_and_no_padding(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    real = router_saturation.Saturation.add

    def add(self: Any, reference: Any, choices: Any) -> None:
        compared.append(len(choices))
        real(self, reference, choices)

    monkeypatch.setattr(router_saturation.Saturation, "add", add)
    more = ["--valid-data", str(folder / "sft.jsonl"), "--eval-iters", "1", "--no-packing"]
    more += ["--log-router-saturation", str(folder / "base"), "--train-iters", "1"]
    assert run(folder, finetuning, "sft", tmp_path, *more) == 0
    # Four texts in rows of 64 positions, none of which fills half of its own.
    assert len(set(compared)) == 1 and 4 * 8 < compared[0] < 4 * 32


@pytest.mark.parametrize(("method", "kind"), [("dpo", "preference"), ("kto", "kto")])
def test_kept_reference_equals_the_live_one_and_no_other_is_taken(
    folder: Path, tmp_path: Path, method: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    live, kept, again = (tmp_path / name for name in ("live", "kept", "again"))
    cache = ("--reference-cache", str(tmp_path / "cache"))
    assert run(folder, alignment, kind, live, "--method", method) == 0
    assert run(folder, alignment, kind, kept, "--method", method, *cache) == 0
    for one, other in zip(records(live), records(kept), strict=True):
        for key in (f"{method}_loss", "rewards_chosen", "rewards_rejected", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), key
    reference = ("--reference-load", str(live))
    assert run(folder, alignment, kind, again, "--method", method, *cache, *reference) == 2
    told = capsys.readouterr().err
    assert "is of another reference: its reference is" in told
    assert not (again / "iter_0000004").exists()


def test_a_run_that_was_stopped_goes_on_bitwise(folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("--method", "kto", "--save-interval", "2")
    assert run(folder, alignment, "kto", whole, *more) == 0
    stopped = (*more, "--exit-interval", "2")
    assert run(folder, alignment, "kto", parts, *stopped) == 0
    assert [each["iteration"] for each in records(parts)] == [1, 2]
    # The very same command: it goes on with the run that it began.
    assert run(folder, alignment, "kto", parts, *stopped) == 0
    assert records(parts) == records(whole)


@pytest.fixture(scope="module")
def begun(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DPO that was stopped after 2 of 4 steps."""
    save = tmp_path_factory.mktemp("begun") / "run"
    more = ("--exit-interval", "2", "--freeze", "router", "--seq-length", "128")
    assert run(folder, alignment, "preference", save, *more) == 0
    return save


@pytest.mark.parametrize(
    ("stage", "kind", "more", "message"),
    [
        (alignment, "preference", ["--optimizer", "rmsprop"], "give --optimizer adam, or start"),
        (alignment, "kto", ["--method", "kto"], "method was dpo and is kto"),
        (alignment, "preference", ["--beta", "0.2"], "beta was 0.1 and is 0.2"),
        (alignment, "preference", ["--average-log-prob"], "was False and is True; give the"),
        (alignment, "preference", ["--moe-aux-loss-coeff", "0.1"], "was 0.0 and is 0.1"),
        (alignment, "preference", ["--template", "zephyr"], "source 'train' holds other"),
        (alignment, "preference", ["--packing"], "was trained on other data"),
        (alignment, "preference", ["--lora-rank", "2"], "a run without adapters"),
        (alignment, "preference", ["--freeze", "norm"], "froze router, this one norm"),
        (
            alignment,
            "preference",
            ["--lr-multipliers", "head=2"],
            "head had 1 x the learning rate and has 2",
        ),
        (alignment, "preference", ["--reference-load", "SELF"], "the reference of the run in the"),
        (finetuning, "sft", [], "is of a run of alignment, and this is one of fine-tuning"),
        (command, "sft", ["--mock-data"], "is of a run of alignment, and this is one of pretrain"),
    ],
)
def test_a_run_goes_on_with_what_it_minimizes_and_its_optimizer_alone(
    folder: Path,
    begun: Path,
    stage: Any,
    kind: str,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--load", str(begun), "--seq-length", "128"]
    flags += [] if {"--freeze", "--lora-rank"} & set(more) else ["--freeze", "router"]
    if stage is alignment:
        flags += ["--reference-load", str(folder / "base")]
    more = [str(begun) if each == "SELF" else each for each in more]
    if stage is command:
        config = begun / "iter_0000002" / "config.yaml"
        recipe = begun.parent / "pretrain.yaml"
        kept = read_saved_config(config, prog="test")
        recipe.write_text(dump_config(kept))
        status = command.main(["--config", str(recipe), "--no-finetune", *flags, *more])
        shut_down()
    else:
        status = run(folder, stage, kind, begun, *flags, *more)
    assert status == 2
    assert message in capsys.readouterr().err
    assert [each["iteration"] for each in records(begun)] == [1, 2]


def test_what_may_change_in_a_run_that_goes_on(folder: Path, begun: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    shutil.copytree(begun, save)
    more = ["--load", str(save), "--reference-load", str(folder / "base"), "--freeze", "router"]
    more += ["--weight-decay-multipliers", "head=0", "--adam-eps", "1e-6", "--micro-batch-size"]
    more += [
        "1",
        "--seq-length",
        "128",
        "--reference-cache",
        str(tmp_path / "cache"),
        "--clip-grad",
        "0.5",
    ]
    more += ["--lr-multipliers", "head=2", "--override-schedule"]
    assert run(folder, alignment, "preference", save, *more) == 0
    assert [each["iteration"] for each in records(save)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("stage", "kind", "more", "message"),
    [
        (finetuning, "sft", ["--load", "nowhere"], "--load nowhere holds no checkpoint; name the"),
        (finetuning, "sft", ["--train-epochs", "0.1"], "are 0 sequences, but a step takes 4"),
        # Of 4 steps, not of the 100 that are the default.
        (
            finetuning,
            "sft",
            ["--train-epochs", "2", "--no-packing", "--lr-warmup-iters", "150"],
            "lr_warmup_iters (150) must be below train_iters (4)",
        ),
        (finetuning, "sft", ["--mock-data"], "data_path, phases and mock_data are for pretraining"),
        (finetuning, "preference", [], "messages"),
        (alignment, "preference", ["--beta", "0"], "beta (0) must be above 0; use 0.1"),
        (alignment, "kto", ["--label-smoothing", "0.1", "--method", "kto"], "is DPO's; drop it"),
        (alignment, "preference", ["--train-on", "all"], "--train-on is all, but alignment"),
    ],
)
def test_bad_input_is_named(
    folder: Path,
    tmp_path: Path,
    stage: Any,
    kind: str,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(folder, stage, kind, tmp_path / "run", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_tools_of_pretraining_know_the_settings_of_the_other_stages() -> None:
    stages = {*schema_of(FinetuneConfig), *schema_of(AlignConfig)}
    assert stages - set(schema_of(PretrainConfig)) == set(OTHER_KEYS)


def test_printed_config_has_the_checkpoints_own_architecture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(folder, finetuning, "sft", tmp_path / "run", "--print-config")
    assert end.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    assert {"num_experts: 6", "num_layers: 2", "vocab_size: 289"} <= set(printed)
