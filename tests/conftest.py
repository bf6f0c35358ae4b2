"""Fixtures for every test: tiny checkpoints, written once and kept in a private temporary folder for later runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch: many tests share few cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
for _name in ("http_proxy", "https_proxy", "all_proxy"):  # every server of these tests stands on the loopback address
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)
# A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that: tests that press it on a
# process of theirs would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The same examples on every run, and no word about how long they take: a test fails for its code, not for its machine.
# HYPOTHESIS_PROFILE=default searches with fresh ones.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.fixture(scope="session")
def checkpoints() -> tuple[Path, ...]:
    """The three variants of `tests.checkpoints`, fp32, read-only by agreement: copy one before changing it."""
    from tests.checkpoints import VARIANTS

    return tuple(_kept(variant) for variant in VARIANTS)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The first of `checkpoints`."""
    return _kept("plain")


def _kept(variant: str) -> Path:
    """The folder of one variant; the recipe's own text is part of its address, so that a change writes anew."""
    recipe = hashlib.sha256(Path(__file__).with_name("checkpoints.py").read_bytes()).hexdigest()[:16]
    root = Path(tempfile.gettempdir()) / f"qvl-checkpoints-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise RuntimeError(f"{root} belongs to somebody else")
    folder = root / recipe / variant
    if not folder.is_dir():
        _write(folder, variant)
    return folder


def _write(folder: Path, variant: str) -> None:
    """Written beside and renamed, so that parallel test processes never see half a checkpoint."""
    from tests.checkpoints import write_checkpoint

    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent))
    write_checkpoint(fresh, seed=len(variant), variant=variant)
    try:
        fresh.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(fresh)
