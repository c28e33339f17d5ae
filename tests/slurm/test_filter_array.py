"""Runs the filter command as arrays of a real SLURM, on both virtual nodes."""

import json
import re
import sys
from pathlib import Path

from moe_app.data import train_tokenizer
from moe_app.filter.filter_data import main
from tests.paths import REPO
from tests.slurm.cluster import Cluster

FILES = 4


def test_arrays_on_two_nodes_make_what_one_process_makes(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(FILES):
        texts = [f"text {each}" for each in range(number, number + 3)]
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl").write_text("".join(lines))
    command = ["--input", str(folder), "--filter", "exact", "--output"]
    on_cluster = ["--executor", "slurm", "--tasks", "2", "--slurm", "exclusive="]
    python = [sys.executable, "-m", "moe_app", "filter"]
    done = cluster.call(*python, *command, str(tmp_path / "arrays"), *on_cluster)
    jobs = dict(re.findall(r"^(\S+): job (\d+)$", done.stdout, re.M))
    assert list(jobs) == ["reading-0", "duplicates-0", "reading-1", "summary"], done.stderr
    assert cluster.wait(jobs["summary"]) == "COMPLETED 0:0"
    shown = cluster.call("scontrol", "show", "job", jobs["reading-1"]).stdout
    assert set(re.findall(r"^\s+NodeList=(\S+)$", shown, re.M)) == {"n0", "n1"}
    assert main([*command, str(tmp_path / "alone")]) == 0
    outputs = [
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*.json*")
            if path.parent.name in ("kept", "dropped", name)
        }
        for name in ("arrays", "alone")
    ]
    assert len(outputs[0]) == 2 * FILES + 2 and outputs[0] == outputs[1]


def test_data_recipe_on_two_nodes_makes_the_token_files_of_one_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe"
    (recipe / "filters").mkdir(parents=True)
    (recipe / "filters/text.yaml").write_text(
        "filters: [{length: {min: 5}}]\ntokenizer_type: HFTokenizer\n"
    )
    (recipe / "sources.tsv").write_text("toy\ta/b\t*\tcontent\ttext\tas-is\t1\n")
    lines = [json.dumps({"content": f"{'word ' * n}{n}"}) + "\n" for n in range(60)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(lines).replace("content", "text"))
    arguments = ["--input", str(corpus), "--output-dir", str(tmp_path), "--vocab-size", "300"]
    assert train_tokenizer.main([*arguments, "--tokenizer-type", "HFTokenizer"]) == 0
    made = []
    for executor in ("slurm", "local"):
        data = tmp_path / executor
        (data / "raw/toy").mkdir(parents=True)
        for part in range(2):
            (data / f"raw/toy/{part}.jsonl").write_text("".join(lines[part::2]))
        script = ["bash", str(REPO / "examples/slurm/prepare_sources.sh"), str(recipe), str(data)]
        done = cluster.call(*script, f"{tmp_path}/tokenizer.json", EXECUTOR=executor, SHARDS="2")
        assert done.returncode == 0, done.stdout + done.stderr
        if executor == "slurm":
            (job,) = re.findall(r"toy: merge: job (\d+)$", done.stdout, re.M)
            assert cluster.wait(job) == "COMPLETED 0:0"
        paths = [data / f"toy_text_document.{suffix}" for suffix in ("bin", "idx")]
        made.append([path.read_bytes() for path in paths])
    assert made[0] == made[1]
