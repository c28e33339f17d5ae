"""Check the range of megatron-core versions that the package accepts."""

import importlib.metadata
import re

import pytest
from packaging.requirements import Requirement

from moe_ext.compat import TESTED, check_versions
from tests.paths import REPO


def fake_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: {"megatron-core": version}[name]
    )


def test_installed_version_is_the_tested_one() -> None:
    assert importlib.metadata.version("megatron-core") == TESTED
    check_versions()


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.17.0", "0.17.1", "1.0"])
def test_unsupported_versions_are_refused_with_the_remedy(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_version(monkeypatch, version)
    message = (
        f"megatron-core {version} is installed; supported is >=0.16.1,<0.17 (tested with 0.16.1):"
        " pip install megatron-core==0.16.1"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_versions()


@pytest.mark.parametrize("version", ["0.16.1", "0.16.2", "0.16.1.post1"])
def test_bug_fix_releases_are_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_version(monkeypatch, version)
    check_versions()


def test_supported_range_matches_pyproject() -> None:
    found = re.findall(r'"(megatron-core[^"]*)"', (REPO / "pyproject.toml").read_text())
    (wanted,) = (Requirement(text) for text in found)
    assert {str(each) for each in wanted.specifier} == {">=0.16.1", "<0.17"}
