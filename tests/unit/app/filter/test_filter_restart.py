"""Check kills, recipes, and what is submitted to a cluster."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.trainer.errors import ConfigError
from moe_app.data import preprocess_data
from moe_app.filter import submissions
from moe_app.filter.filter_data import main
from moe_app.filter.filter_page import filter_page
from moe_app.filter.filter_recipe import read_filter_recipe
from moe_app.filter.filter_specs import parse_filter
from moe_app.filter.pipeline import cluster_executors
from moe_app.filter.pipeline.cluster_executors import parse_slurm
from tests.distributed.launcher import program
from tests.paths import REPO
from tests.unit.app.filter import kill_worker
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer

TEXT = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        texts = [TEXT, f"{TEXT} {name}", f"other {name}", "more\n\nmore", name]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def test_kill_at_any_write_and_a_restart_make_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    filters = ["exact", "minhash:buckets=2", "length:min=2"]
    command = [sys.executable, *program(kill_worker.__file__), str(tmp_path / "out")]
    command += ["--input", str(corpus), *(f"--filter={each}" for each in filters)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    kills = re.fullmatch(r"(\d+) kills\n", done.stdout)
    assert kills and int(kills[1]) > 10
    reasons = (tmp_path / "out/dropped/b.jsonl").read_text()
    for reason in ("exact: duplicate", "minhash: near-duplicate", "length: too-short"):
        assert reason in reasons


def test_recipe_is_the_command_line_it_stands_for(tmp_path: Path, corpus: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"input: [{corpus}]\noutput: {tmp_path}/by_recipe\nmax_bad_lines: 3\n"
        "filters:\n  - exact: {by: paragraph}\n  - length: {min: 2, unit: characters}\n"
    )
    flags = ["--filter", "exact:by=paragraph", "--filter", "length:min=2,unit=characters"]
    assert main(["--recipe", str(recipe)]) == 0
    assert main(["--recipe", str(recipe), "--output", f"{tmp_path}/again", "--workers", "1"]) == 0
    assert main(["--input", str(corpus), "--output", f"{tmp_path}/by_flags", *flags]) == 0
    summaries = [
        (tmp_path / name / "summary.json").read_bytes()
        for name in ("by_recipe", "again", "by_flags")
    ]
    assert summaries[0] == summaries[1] == summaries[2]
    read = read_filter_recipe(str(recipe))
    assert read["filters"] == [parse_filter(flags[1]), parse_filter(flags[3])]


def test_recipe_ends_in_the_token_files_of_its_kept_documents(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_hf_tokenizer(tmp_path / "tok", ["<unk>", "</s>"], config={"eos_token_id": 1})
    flags = ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", model]
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        f"input: [{corpus}]\nfilters: [exact]\ntokenize: true\nappend_eod: true\n"
        f"tokenizer_type: HFTokenizer\ntokenizer_model: {model}\n"
    )
    assert main(["--recipe", str(recipe), "--output", str(out)]) == 0
    assert (out / "summary.json").exists()
    prefix = str(out / "tokens/kept")
    merge = ["--output-prefix", prefix, "--merge", "--num-shards", "2"]
    assert preprocess_data.main(merge) == 0
    kept = [str(out / "kept" / name) for name in ("a.jsonl", "b.jsonl")]
    for name, inputs, shard in (
        ("all", kept, ""),
        ("0", kept[:1], ".shard-00000-of-00002"),
        ("1", kept[1:], ".shard-00001-of-00002"),
    ):
        command = ["--input", *inputs, "--output-prefix", str(tmp_path / name), "--append-eod"]
        assert preprocess_data.main([*command, *flags]) == 0
        for suffix in (".bin", ".idx"):
            made = Path(f"{prefix}_text_document{shard}{suffix}").read_bytes()
            assert made == (tmp_path / f"{name}_text_document{suffix}").read_bytes()
    manifest = json.loads(Path(f"{prefix}_text_document.json").read_text())
    assert manifest["num_input_files"] == 2
    assert [each["path"] for each in manifest["sources"]] == kept
    capsys.readouterr()
    common = ["--input", str(corpus), "--output", str(tmp_path / "no"), "--filter", "exact"]
    assert main([*common, "--tokenize"]) == 2
    assert "--tokenize makes tokens, but no tokenizer is named" in capsys.readouterr().err
    assert main([*common, "--append-eod"]) == 2
    assert "add --tokenize, or leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokenize: 1", "tokenize is 1; it must be true or false"),
        ("inputs: [a]", "no setting is named 'inputs'; did you mean 'input'?"),
        ("input: a", "input is 'a'; it must be a list"),
        ("workers: true", "workers is True; it must be a whole number"),
        ("filters: [{exact: {}, length: {}}]", "is no filter; write its name"),
        ("filters: [{exact: {by: 3}}]", "exact: by is 3; it must be a text"),
        ("filters: !!python/name:os.system", "is not a YAML recipe"),
        ("a: &a [*a]", "is not a YAML recipe"),
        ("- exact", "holds no mapping"),
    ],
)
def test_wrong_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_filter_recipe(str(recipe))


def test_arrays_wait_for_each_other_and_hold_no_pickle(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripts: dict[str, str] = {}

    def submit(script: Path) -> str:
        scripts[script.parent.name] = script.read_text()
        return str(100 + len(scripts))

    monkeypatch.setattr(cluster_executors, "submit", submit)
    out = tmp_path / "out"
    command = ["--input", str(corpus), "--output", str(out), "--filter", "exact"]
    command += ["--executor", "slurm", "--workers", "3", "--slurm", "partition=cpu"]
    assert main(command) == 0
    assert list(scripts) == ["reading-0", "duplicates-0", "reading-1", "summary"]
    assert "#SBATCH --array=0-1%3\n" in scripts["reading-0"]
    assert "#SBATCH --dependency" not in scripts["reading-0"]
    assert "#SBATCH --dependency=afterok:103\n" in scripts["summary"]
    assert all("#SBATCH --partition=cpu\n" in script for script in scripts.values())
    command_line = f"moe_app filter --output {out} --run-stage reading-1 --submission "
    assert command_line in scripts["reading-1"]
    assert scripts["reading-1"].endswith(' --share "$SLURM_ARRAY_TASK_ID"\n')
    assert not list(out.rglob("*.pik"))
    shown = capsys.readouterr().out
    assert "reading-0: job 101\n" in shown
    # What is done is not submitted again, and the rest no longer waits for it.
    monkeypatch.setattr(submissions, "has_ended", lambda job: True)
    assert main(command[:6]) == 0
    scripts.clear()
    assert main(command) == 0 and scripts == {}


@pytest.mark.parametrize("setting", ["partition", "=cpu", "a b=c", "time=1\n#SBATCH --x", "-p=a"])
def test_only_options_of_sbatch_reach_a_script(setting: str) -> None:
    with pytest.raises(ConfigError, match="is no option of sbatch; write NAME=VALUE"):
        parse_slurm([setting])


def test_stage_that_is_not_there_is_refused(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["--input", str(corpus), "--output", out, "--filter", "length:min=1"]) == 0
    assert main(["--output", out, "--run-stage", "reading-9"]) == 2
    assert "has no such stage; it has reading-0, summary" in capsys.readouterr().err


def test_page_shows_documents_as_text() -> None:
    sample = {"file": "f", "line": 1, "reason": "r", "detail": {}, "text": "<script>\ud800\x1b[1m"}
    counts = {"documents": 1234, "kept": 1000, "dropped": 234, "bad_lines": 0}
    spec = {"name": "exact", "reasons": {"r": 234}, "sample": [sample], **counts}
    summary = {**counts, "filters": [spec], "files": [], "notes": {}, "bad_line_places": []}
    page = filter_page(summary)
    assert "&lt;script&gt;?\\x1b[1m" in page and "<script" not in page
    assert "<td class=n>1,234</td>" in page and "<td>r 234</td>" in page
