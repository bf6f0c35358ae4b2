"""Where a model's folder is: a path, a name in the usual places, or the bundled demonstration checkpoint.

Knows folders of this machine. Downloads nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from qvl.errors import ConfigError, suggest

DEMO = "demo"
_PLACES = "./, ./models, $QVL_MODELS, ~/models or the Hugging Face cache"


def demo_folder() -> Path:
    """The checkpoint that comes with the package."""
    return Path(__file__).resolve().parent.parent / "demo"


def find_model(model: str) -> Path:
    """The checkpoint folder that `model` names. Raises `ConfigError` telling where it looked.

    Tried in order: "demo"; a path; `model`, then its last part (of "Qwen/Qwen2-VL-7B-Instruct"), under ./, ./models,
    $QVL_MODELS, ~/models; the Hugging Face cache.
    """
    if model == DEMO and not _is_checkpoint(Path(DEMO)):
        return demo_folder()
    given = Path(os.path.expanduser(model))
    if _is_checkpoint(given):
        return given.resolve()
    if given.is_dir():
        raise ConfigError(f"{given}: this folder has no config.json, so it is no checkpoint", param="model")
    last = given.name
    for place in _places():
        for name in dict.fromkeys((model, last)):
            if name and _is_checkpoint(place / name):
                return (place / name).resolve()
    cached = _in_hub_cache(model)
    if cached is not None:
        return cached
    raise ConfigError(f"no checkpoint folder '{model}' in {_PLACES}{_hint(model, last)}", param="model")


def _hint(model: str, last: str) -> str:
    """A name that is nearly right; else, for a name of the hub, how it gets here."""
    close = suggest(last, _names())
    if close or model.count("/") != 1 or model.startswith((".", "/", "~")):
        return close
    return f"; qvl downloads nothing, `hf download {model}` (of huggingface_hub) does"


def _is_checkpoint(folder: Path) -> bool:
    return os.path.isfile(folder / "config.json")  # False also where one may not look


def _places() -> list[Path]:
    named = os.environ.get("QVL_MODELS", "").split(os.pathsep)
    places = [Path(), Path("models"), *(Path(p) for p in named if p), Path(os.path.expanduser("~/models"))]
    return [place.resolve() for place in places if place.is_dir()]


def _names() -> Iterator[str]:
    """Names of the checkpoints there are, for a suggestion."""
    yield DEMO
    for place in _places():
        with contextlib.suppress(OSError):  # a folder that is not ours to read
            yield from (folder.name for folder in place.iterdir() if _is_checkpoint(folder))


def _in_hub_cache(model: str) -> Path | None:
    """The newest snapshot of "owner/name" that an earlier download left in the Hugging Face cache."""
    home = Path(os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    if model.count("/") != 1:
        return None
    snapshots = hub / f"models--{model.replace('/', '--')}" / "snapshots"
    found = [folder for folder in snapshots.glob("*") if _is_checkpoint(folder)]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)
