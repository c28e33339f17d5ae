"""Runs the filter command as arrays of a real SLURM, on both virtual nodes."""

import json
import re
import sys
from pathlib import Path

from moe_app.filter.filter_data import main
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
