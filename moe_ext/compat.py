"""Check megatron-core's version, list the versions tested together, and hide how its lines differ.

Two lines of megatron-core are supported. A difference between them is a function here, or in
`megatron.trainer.compat`, and nowhere else; each says which versions need which branch. Everything
marked 0.16 can go on the day Python 3.11 is given up (its support ends in October 2027), because
0.16.1 is the last release for it.

Bugs that a block of ours works around are listed where the block is: expert weights missing from
the gradient norm (`experts.mlp`), float token counts and the aux loss's routing map
(`routers.base`).
"""

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import Version


@dataclass(frozen=True, kw_only=True)
class Line:
    """Describes the releases of megatron-core that are supported on some versions of Python."""

    tested: str
    """The version that the tests run against; the lowest supported one."""
    below: str
    """The first version that is not supported."""
    python: str
    """The Python versions for which pip installs it, as an environment marker compares them."""

    @property
    def supported(self) -> str:
        """Return the versions as a requirement names them."""
        return f">={self.tested},<{self.below}"


LINES = (
    Line(tested="0.16.1", below="0.17", python="< 3.12"),
    Line(tested="0.19.2", below="0.20", python=">= 3.12"),
)
"""The supported lines, oldest first; `pyproject.toml` has the same ones. Either runs on a Python
for which it can be installed: 0.16.1 on 3.12 too."""
_COMMON = {
    "torch": "2.13",
    "numpy": "2",
    "triton": "3",
    "transformers": "5",
    "tokenizers": "0",
    "sentencepiece": "0.2",
    "safetensors": "0",
}
TESTED_COMBINATIONS: tuple[Mapping[str, str], ...] = (
    {"python": "3.11", "megatron-core": LINES[0].tested, **_COMMON},
    {"python": "3.12", "megatron-core": LINES[1].tested, **_COMMON},
)
"""Versions that the tests run with, as precise as matters; on CPUs, with gloo."""


def check_versions() -> None:
    """Refuse a megatron-core version this package was not written for.

    Raises:
        ValueError: the installed version is in no supported range.
    """
    installed = importlib.metadata.version("megatron-core")
    if not any(Version(line.tested) <= Version(installed) < Version(line.below) for line in LINES):
        ranges = "; ".join(f"{line.supported} for Python {line.python}" for line in LINES)
        raise ValueError(
            f"megatron-core {installed} is installed; supported is {ranges}: pip install"
            f" megatron-core=={line_for_python().tested}"
        )


def line_for_python() -> Line:
    """Return the line that pip installs for this Python."""
    return LINES[0] if Version(platform.python_version()) < Version("3.12") else LINES[1]


def without_cuda_graphs() -> dict[str, list[str]]:
    """Return the fields of a TransformerConfig which say that no part of a layer is captured.

    0.16: `cuda_graph_scope`. 0.19 has renamed it to `cuda_graph_modules`, and warns of the old one.
    """
    return {"cuda_graph_modules" if _has("0.19") else "cuda_graph_scope": []}


def expert_norm_group(groups: Any) -> Any:
    """Return the group over which an expert optimizer sums the gradient norm.

    0.16: `tp_ep_pp`. 0.19: another one, of the same ranks unless weights are rematerialized.

    Args:
        groups: megatron-core's ProcessGroupCollection.
    """
    return groups.tp_ep_pp_with_egtp_remat if _has("0.19") else groups.tp_ep_pp


def _has(version: str) -> bool:
    """Return whether the installed megatron-core is this version or a later one."""
    return Version(importlib.metadata.version("megatron-core")) >= Version(version)


def installed_version(name: str) -> str | None:
    """Return the version of a package, or of "python"; None if it is not installed."""
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_version(version: str, tested: str) -> bool:
    """Return whether `version` matches the tested one, as 2.13.1 matches 2.13."""
    return Version(version).release[: len(Version(tested).release)] == Version(tested).release


def nearest_combination(installed: Mapping[str, str | None]) -> Mapping[str, str]:
    """Return the tested combination that matches most of the installed versions."""

    def num_matching(combination: Mapping[str, str]) -> int:
        return sum(
            version is not None and is_version(version, combination[name])
            for name, version in installed.items()
            if name in combination
        )

    return max(TESTED_COMBINATIONS, key=num_matching)
