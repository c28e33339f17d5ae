"""Starts SLURM for the tests in this directory; one for each test process."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, what_is_missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, n0 and n1; skips where SLURM's daemons cannot run."""
    missing = what_is_missing()
    if missing is not None:
        pytest.skip(f"NO SLURM HERE, its scripts are not tested: {missing}")
    root = tmp_path_factory.mktemp("slurm")
    started = Cluster.start(root / "cluster", root / "work")
    try:
        yield started
    finally:
        started.stop()
