"""Differences between megatron-core versions, and guards for its known bugs.

Each guard names the versions it serves. Bugs that a block of ours steps around by construction are
listed where the block is: expert weights that drop out of the gradient norm (`experts.mlp`), float
token counts and the aux loss's routing map (`routers.base`).
"""

import importlib.metadata

from packaging.version import Version

TESTED = "0.16.1"
"""The megatron-core version that the tests run against."""
_LOWEST, _HIGHEST = Version("0.16.1"), Version("0.17")


def check_versions() -> None:
    """Refuse a megatron-core whose seams this package was not written against.

    Raises:
        ValueError: the installed version is outside the supported range.
    """
    installed = importlib.metadata.version("megatron-core")
    if not _LOWEST <= Version(installed) < _HIGHEST:
        raise ValueError(
            f"megatron-core {installed} is installed; supported is >={_LOWEST},<{_HIGHEST} (tested"
            f" with {TESTED}): pip install megatron-core=={TESTED}"
        )
