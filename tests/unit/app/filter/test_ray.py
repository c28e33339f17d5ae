"""Runs the filter command on a local Ray cluster of two workers, where Ray is installed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.errors import ConfigError
from moe_app.filter.filter_data import main
from moe_app.filter.pipeline import cluster_executors
from tests.unit.app.filter.four_files import finished_corpus, write_four_files

ray: Any = pytest.importorskip("ray", reason="ray is an extra of its own")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Start a cluster of two workers."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    folder = tmp_path / "in"
    write_four_files(folder)
    filters = ["--filter", "minhash:buckets=2,ngram=2", "--filter", "exact"]
    return ["--input", str(folder), *filters, "--output"]


def test_two_workers_make_what_one_process_makes(
    cluster: None, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_ray = ["--executor", "ray", "--workers", "2"]
    assert main([*command, str(tmp_path / "ray"), *on_ray]) == 0
    assert main([*command, str(tmp_path / "alone")]) == 0
    assert finished_corpus(tmp_path / "ray") == finished_corpus(tmp_path / "alone")
    logs = [path.name for path in (tmp_path / "ray/work/stages/reading-0/logs").iterdir()]
    assert len(logs) == 4
    with (tmp_path / "in/2.jsonl").open("ab") as file:
        file.write(b"no JSON\n")
    capsys.readouterr()
    assert main([*command, str(tmp_path / "bad"), *on_ray]) == 2
    said = capsys.readouterr().err
    assert "reading-0: 1 of 4 tasks failed, first task 2:" in said and "2.jsonl, line" in said
    assert main([*command, str(tmp_path / "bad"), *on_ray, "--max-bad-lines", "1"]) == 0
    assert (tmp_path / "bad/summary.json").exists()


class Lost:
    """Ends the process of a task that gets it."""

    def run_task(self, rank: int) -> None:
        raise SystemExit(f"task {rank}")


def test_a_process_that_is_lost_is_an_error_of_its_tasks(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_executors, "_RETRIES", 0)
    lost: Any = Lost()
    found = cluster_executors._run_shares(ray, lost, [[0, 3]], at_once=1)
    assert found.keys() == {0, 3}, "every task of a share is named"
    assert "died" in found[0] or "Crash" in found[0]


def test_a_cluster_without_a_cpu_is_refused(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_executors, "_CPU_WAIT_S", 0.0)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    with pytest.raises(ConfigError, match="the Ray cluster had no CPU for 0 s"):
        cluster_executors._wait_for_cpus(ray)
