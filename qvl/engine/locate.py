"""Where a model's folder is: a path, a name in the usual places, or the bundled demonstration checkpoint.

Knows folders of this machine. Downloads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qvl.errors import ConfigError, suggest

DEMO = "demo"


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
    given = Path(model).expanduser()
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
    looked = ", ".join(str(place) for place in _places())
    raise ConfigError(f"no checkpoint folder '{model}' here or in {looked}{suggest(last, _names())}", param="model")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _places() -> list[Path]:
    named = os.environ.get("QVL_MODELS", "").split(os.pathsep)
    places = [Path(), Path("models"), *(Path(p) for p in named if p), Path.home() / "models"]
    return [place.resolve() for place in places if place.is_dir()]


def _names() -> Iterator[str]:
    """Names of the checkpoints there are, for a suggestion."""
    yield DEMO
    for place in _places():
        yield from (folder.name for folder in place.iterdir() if _is_checkpoint(folder))


def _in_hub_cache(model: str) -> Path | None:
    """The newest snapshot of "owner/name" that an earlier download left in the Hugging Face cache."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", str(home / "hub")))
    if model.count("/") != 1:
        return None
    snapshots = hub / f"models--{model.replace('/', '--')}" / "snapshots"
    found = [folder for folder in snapshots.glob("*") if _is_checkpoint(folder)]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)
