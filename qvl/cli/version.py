"""`qvl version`: one line, with the versions that decide what a checkpoint's answers look like."""

from __future__ import annotations

import platform
from importlib import metadata


def version() -> None:
    """Print the versions of qvl, Python, torch and tokenizers."""
    parts = [f"qvl {installed('qvl')}", f"Python {platform.python_version()}"]
    print(", ".join([*parts, *(f"{name} {installed(name)}" for name in ("torch", "tokenizers"))]))


def installed(package: str) -> str:
    """The installed version of a package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        from qvl import __version__

        return __version__ if package == "qvl" else "missing"
