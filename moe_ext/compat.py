"""Check megatron-core's version, and list the versions tested together.

Bugs that a block of ours works around are listed where the block is: expert weights missing from
the gradient norm (`experts.mlp`), float token counts and the aux loss's routing map
(`routers.base`).
"""

import importlib.metadata
import platform
from collections.abc import Mapping

from packaging.version import Version

TESTED = "0.16.1"
"""The megatron-core version that the tests run against."""
TESTED_COMBINATIONS: tuple[Mapping[str, str], ...] = (
    {
        "python": "3.11",
        "torch": "2.13",
        "megatron-core": TESTED,
        "numpy": "2",
        "triton": "3",
        "transformers": "5",
        "tokenizers": "0",
        "sentencepiece": "0.2",
        "safetensors": "0",
    },
)
"""Versions that the tests run with, as precise as matters; on CPUs, with gloo."""
_LOWEST, _HIGHEST = Version("0.16.1"), Version("0.17")


def check_versions() -> None:
    """Refuse a megatron-core version this package was not written for.

    Raises:
        ValueError: the installed version is outside the supported range.
    """
    installed = importlib.metadata.version("megatron-core")
    if not _LOWEST <= Version(installed) < _HIGHEST:
        raise ValueError(
            f"megatron-core {installed} is installed; supported is >={_LOWEST},<{_HIGHEST} (tested"
            f" with {TESTED}): pip install megatron-core=={TESTED}"
        )


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
