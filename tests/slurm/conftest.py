"""Starts one SLURM cluster per test process for the tests in this directory."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, unmet_requirement


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start two nodes, n0 and n1; skip where SLURM's daemons cannot run."""
    missing = unmet_requirement()
    if missing is not None:
        pytest.skip(f"SLURM is not available, its scripts are not tested: {missing}")
    root = tmp_path_factory.mktemp("slurm")
    started = Cluster.start(root / "cluster", root / "work")
    try:
        yield started
    finally:
        started.stop()
