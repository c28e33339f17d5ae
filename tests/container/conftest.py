"""Builds the images on two bases, once for all tests of this directory."""

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.bases import CPU_BASE, make_cpu_base, make_gpu_base
from tests.container.buildah import Container, Store, command
from tests.paths import REPO

APT_PACKAGES = ("buildah", "debootstrap")
NOT_COPIED = {".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", "runs", "data"}


def default_base() -> str:
    """Return the base image that the Dockerfile names."""
    text = (REPO / "Dockerfile").read_text("utf-8")
    (found,) = re.findall(r"^ARG BASE_IMAGE=(.+)$", text, re.MULTILINE)
    return str(found)


def install_tools() -> None:
    missing = [name for name in APT_PACKAGES if shutil.which(name) is None]
    if os.geteuid() != 0 or (missing and shutil.which("apt-get") is None):
        pytest.fail(
            "these tests need root, for debootstrap and chroots, and Debian's or Ubuntu's packages"
            f" {' and '.join(APT_PACKAGES)}; missing: {', '.join(missing) or 'root'}",
            pytrace=False,
        )
    if missing:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command("apt-get", "-qq", "update", env=quiet)
        command("apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing, env=quiet)


@pytest.fixture(scope="session")
def store() -> Iterator[Store]:
    """Yield a store that is removed at the end unless KEEP is set."""
    install_tools()
    # Clean up on SIGTERM, too.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", 143))
    made = Store(Path(tempfile.mkdtemp(prefix="container-test.")))
    yield made
    if os.environ.get("KEEP"):
        print(f"kept: {made.work}, storage driver {made.driver}")
    else:
        made.remove()


@pytest.fixture(scope="session")
def checkout(store: Store) -> Path:
    """Make a checkout that is private to its owner and has files that no image may contain."""
    copy = store.work / "checkout"

    def not_copied(folder: str, names: list[str]) -> set[str]:
        return NOT_COPIED & set(names) if Path(folder) == REPO else set()

    shutil.copytree(REPO, copy, ignore=not_copied)
    for name in (".git/config", ".venv/made", "runs/mine/log", "tools/__pycache__/a.pyc", ".env"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("private\n")
    (copy / "examples/.key").write_text("private\n")
    command("chmod", "-R", "go=", copy)
    return copy


@pytest.fixture(scope="session")
def cpu(store: Store, checkout: Path) -> Container:
    """Build the image on a base without torch."""
    make_cpu_base(store)
    arguments = {"BASE_IMAGE": CPU_BASE, "VERSION": "9.8.7", "REVISION": "abc"}
    store.build("cpu", checkout, *(f"--build-arg={k}={v}" for k, v in arguments.items()))
    return store.start("cpu")


@pytest.fixture(scope="session")
def gpu(store: Store, checkout: Path, cpu: Container) -> Container:
    """Build the image on a base with its own torch, without extras to save time."""
    make_gpu_base(store, cpu, default_base())
    store.build("gpu", checkout, "--build-arg=EXTRAS=")
    return store.start("gpu")
