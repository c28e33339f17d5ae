"""Check the ranges of megatron-core versions that the package accepts, and where they differ."""

import importlib.metadata
import platform
import re
import sys
import warnings

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.requirements import Requirement

from moe_ext.compat import LINES, check_versions, line_for_python, without_cuda_graphs
from tests.paths import REPO


def fake_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: {"megatron-core": version}[name]
    )


def test_installed_version_is_a_tested_one() -> None:
    installed = importlib.metadata.version("megatron-core")
    assert installed in [line.tested for line in LINES]
    if sys.version_info < (3, 12):
        assert installed == "0.16.1"
    check_versions()


@pytest.mark.parametrize(
    "version", ["0.15.3", "0.16.0", "0.17.0", "0.18.1", "0.19.1", "0.20.0", "1.0"]
)
@pytest.mark.parametrize(
    ("python", "remedy"), [("3.11.7", "0.16.1"), ("3.12.0", "0.19.2"), ("3.13.0", "0.19.2")]
)
def test_unsupported_versions_are_refused_with_the_remedy(
    version: str, python: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_version(monkeypatch, version)
    monkeypatch.setattr(platform, "python_version", lambda: python)
    message = (
        f"megatron-core {version} is installed; supported is >=0.16.1,<0.17 for Python < 3.12;"
        f" >=0.19.2,<0.20 for Python >= 3.12: pip install megatron-core=={remedy}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_versions()


@pytest.mark.parametrize("version", ["0.16.1", "0.16.2", "0.16.1.post1", "0.19.2", "0.19.3"])
def test_bug_fix_releases_are_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_version(monkeypatch, version)
    check_versions()


def test_supported_ranges_match_pyproject() -> None:
    found = re.findall(r'"(megatron-core[^"]*)"', (REPO / "pyproject.toml").read_text())
    wanted = [Requirement(text) for text in found]
    assert len(wanted) == len(LINES)
    for requirement, line in zip(wanted, LINES, strict=True):
        assert {str(each) for each in requirement.specifier} == set(line.supported.split(","))
    # Every Python gets the one line that the remedy names.
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        environment = {"python_version": python}
        (chosen,) = (each for each in wanted if each.marker and each.marker.evaluate(environment))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(platform, "python_version", lambda version=python: f"{version}.0")
            assert line_for_python().tested in chosen.specifier


def test_no_part_of_a_layer_is_captured_by_a_cuda_graph() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fields = without_cuda_graphs()
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, **fields)
    (name,) = fields
    assert getattr(config, name) == []
