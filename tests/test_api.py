"""The public surface: what is exported exists, and importing it loads no torch."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import svftool
from svftool import errors

ROOT = Path(__file__).resolve().parents[1]
TORCH_FREE = "import sys, svftool, svftool.cli; sys.exit('torch' in sys.modules)"


@pytest.mark.parametrize("name", svftool.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(svftool, name) is not None


def test_names_are_sorted_and_listed_by_dir() -> None:
    assert svftool.__all__ == sorted(svftool.__all__)
    assert set(svftool.__all__) <= set(dir(svftool))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sing'"):
        _ = svftool.sing


def test_functions_are_not_shadowed_by_submodules() -> None:
    code = """
import svftool.attaching, svftool.auditing, svftool.stages.merge, svftool.stages.audit
import svftool.stages.decompose, svftool.stages.extract, svftool.stages.finetune, svftool
names = ["attach", "detach", "audit", "merge", "decompose", "extract", "finetune"]
assert all(callable(getattr(svftool, name)) for name in names)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_loads_no_torch() -> None:
    assert subprocess.run([sys.executable, "-c", TORCH_FREE], cwd=ROOT).returncode == 0


def test_the_check_for_torch_can_fail() -> None:
    code = TORCH_FREE.replace("svftool.cli;", "svftool.cli, torch;")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 1


def test_each_error_has_its_exit_code() -> None:
    found = {kind.__name__: kind.exit_code for kind in errors.SvftoolError.__subclasses__()}
    assert found == {
        "UsageError": 2,
        "CheckpointError": 3,
        "FactorsError": 4,
        "NumericalError": 5,
        "DataError": 6,
        "ModelError": 7,
        "ResourceError": 8,
        "MissingDependencyError": 9,
        "GateError": 10,
    }


def test_changelog_and_version_agree() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    versions = [line[4:].split("]")[0] for line in lines if line.startswith("## [")]
    newest = next(version for version in versions if version != "Unreleased")
    assert newest == svftool.__version__


def test_core_dependencies_are_what_was_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0] for requirement in project["dependencies"]}
    # threadpoolctl (pure Python, 50 kB) holds the BLAS of numpy and scipy at one thread a matrix.
    assert names == {"typer", "torch", "safetensors", "rich", "numpy", "scipy", "threadpoolctl"}
    assert all("<" not in one and "==" not in one for one in project["dependencies"])
