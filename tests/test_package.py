"""What is installed is what is imported: dependencies, pinned versions, and files that are no Python."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MODULES = {"pillow": "PIL", "markdown-it-py": "markdown_it"}  # distributions whose module has another name
OF_TORCH = {"nvidia-cuda-nvrtc", "cuda-bindings"}  # torch for GPUs pins them, each of its builds another version


def listed(section: str) -> list[str]:
    block = re.search(rf"^{section} = \[\n(.*?)^\]", PYPROJECT, re.M | re.S)
    assert block is not None
    return re.findall(r'^  "([\w-]+)', block[1], re.M)


def imported() -> set[str]:
    """Top-level names that the package imports anywhere, standard library and itself left out."""
    names: set[str] = set()
    for path in (ROOT / "qvl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"qvl"}


def test_dependencies_are_what_is_imported() -> None:
    """Beside these: transformers, which one benchmark measures; triton, which torch brings where there are GPUs;
    typing_extensions, for type checkers only; pandas, which only who asks for its tables has.
    """
    declared = {MODULES.get(name, name.replace("-", "_")) for name in listed("dependencies")}
    assert declared == imported() - {"transformers", "triton", "typing_extensions", "pandas"}


@pytest.mark.parametrize("name", ["dependencies", "dev"])
def test_every_dependency_has_a_tested_version(name: str) -> None:
    """But those of which a pin would keep some build of torch from being installed."""
    pins = (ROOT / "constraints" / "versions.txt").read_text(encoding="utf-8")
    assert {package for package in listed(name) if not re.search(rf"^{package}==", pins, re.M)} <= OF_TORCH


def test_pins_name_no_local_version() -> None:
    """torch==2.13.0+cpu could not be installed by somebody with a GPU."""
    pins = (ROOT / "constraints" / "versions.txt").read_text(encoding="utf-8")
    assert not re.search(r"^[\w-]+==[^;\s]*\+", pins, re.M)


def test_pins_are_within_the_declared_ranges() -> None:
    from packaging.requirements import Requirement

    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints" / "versions.txt").read_text(), re.M))
    block = "".join(re.findall(r"^(?:dependencies|dev) = \[\n(.*?)^\]", PYPROJECT, re.M | re.S))
    for text in re.findall(r'^  "(.*?)",', block, re.M):
        requirement = Requirement(text)
        if requirement.name not in OF_TORCH:
            assert requirement.specifier.contains(pins[requirement.name]), text


def test_the_command_is_declared() -> None:
    assert 'qvl = "qvl.__main__:main"' in PYPROJECT
    from qvl.__main__ import main

    assert callable(main)


def test_metadata_of_an_installed_qvl_agrees() -> None:
    """Nothing to compare where the tests run from a bare checkout."""
    from qvl import __version__

    versions = [d.version for d in metadata.distributions() if d.metadata["Name"] == "qvl"]
    assert set(versions) <= {__version__}
