"""Builds substitutes for base images, because tests pull none.

A Debian from debootstrap replaces the slim Python image. The same with torch as a system package
and the conventions of NVIDIA's image replaces that one. Debian's Python is 3.11, so that the images
built here have the older line of megatron-core.
"""

import re
import shutil
from pathlib import Path

from tests.container.buildah import Container, Store, command

CPU_BASE = "docker.io/library/python:3.12-slim-bookworm"
NVIDIA_TORCH = "2.13.0a0+0123456789.nv26.07"
SYSTEM_PACKAGES = "/usr/local/lib/python3.11/dist-packages"
VENV_PACKAGES = "/opt/venv/lib/python3.11/site-packages"
_SUITE = "bookworm"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NEEDED = "python3,python3-venv,python3-pip,ca-certificates"


def make_cpu_base(store: Store) -> None:
    """Build a Debian with Python and pip."""
    debian = store.work / "debian"
    command("debootstrap", "--variant=minbase", f"--include={_NEEDED}", _SUITE, debian)
    base = store.start("scratch")
    store("copy", "-q", base.name, debian, "/")
    store("config", "--cmd", "python3", f"--env=PATH={_PATH}", base.name)
    store.commit(base, CPU_BASE)
    shutil.rmtree(debian)


def make_gpu_base(store: Store, cpu: Container, image: str) -> None:
    """Build a base with its own torch and numpy, in versions of no index, and a user 1000.

    And an entry point, and libraries that are prepared in BASH_ENV. torch itself comes from `cpu`.
    """
    base = store.start(CPU_BASE)
    _copy_torch(cpu.path(VENV_PACKAGES), base.path(SYSTEM_PACKAGES))
    for name, text in (
        ("/etc/pip/constraint.txt", f"torch=={NVIDIA_TORCH}\n"),
        ("/etc/prepare", "export PREPARED=for-the-driver\n"),
        ("/opt/nvidia/entrypoint.sh", "#!/bin/sh\nexit 99\n"),
    ):
        base.path(name).parent.mkdir(parents=True, exist_ok=True)
        base.path(name).write_text(text)
    base.path("/opt/nvidia/entrypoint.sh").chmod(0o755)
    base.run("useradd", "--create-home", "--uid", "1000", "ubuntu", entry=False)
    variables = ("BASH_ENV=/etc/prepare", "PIP_CONSTRAINT=/etc/pip/constraint.txt")
    entry = ("--entrypoint", '["/opt/nvidia/entrypoint.sh"]')
    store("config", *entry, *(f"--env={variable}" for variable in variables), base.name)
    store.commit(base, image)


def _copy_torch(packages: Path, system: Path) -> None:
    system.mkdir(parents=True, exist_ok=True)
    parts = ["torch", "torchgen", "functorch", "numpy", "numpy.libs"]
    parts += [path.name for path in packages.glob("numpy-*.dist-info")]
    command("cp", "-a", *(packages / part for part in parts), system)
    (described,) = packages.glob("torch-2*.dist-info")
    renamed = system / f"torch-{NVIDIA_TORCH}.dist-info"
    command("cp", "-a", described, renamed)
    _set(renamed / "METADATA", "Version:", NVIDIA_TORCH)
    _set(system / "torch/version.py", "__version__ =", f"'{NVIDIA_TORCH}'")


def _set(file: Path, name: str, value: str) -> None:
    """Set the value of the line of `file` that starts with `name`."""
    line = re.compile(rf"^{name} .*$", re.MULTILINE)
    text, count = line.subn(f"{name} {value}", file.read_text("utf-8"))
    assert count == 1, f"{file} has {count} lines that begin with {name!r}"
    file.write_text(text, "utf-8")
