"""A font of this machine that has the characters of some texts.

Pillow's own font is Latin only, so Chinese needs one of the system's: fontconfig is asked, then the usual folders are
looked through. Whether a font has a character is seen by drawing it: a font draws one and the same
sign for all that it lacks.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import ImageFont

PROBE_SIZE = 24
FONTCONFIG_SECONDS = 10
MOST_FONTS = 400  # a machine may hold thousands
_MISSING = "\U0010fffe"  # a noncharacter: no font has it
_PREFERRED = (
    "notosans",
    "sourcehan",
    "wqy",
    "microhei",
    "pingfang",
    "hiragino",
    "msyh",
    "droidsans",
    "uming",
    "dejavusans",
)
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "/System/Library/Fonts", "~/.fonts")


def font_for(texts: Iterable[str], size: int) -> ImageFont.FreeTypeFont | None:
    """A font of `size` pixels with every character of `texts`, Pillow's own where it has them; None where none has."""
    needed = frozenset(char for text in texts for char in text if not char.isspace())
    own = _own(size)
    if own is None or _has_all(_own(PROBE_SIZE), needed):
        return own
    path = _file_with(needed)
    return None if path is None else ImageFont.truetype(path, size)


def _own(size: int) -> ImageFont.FreeTypeFont | None:
    """Pillow's own font; None where Pillow was built without FreeType, which can draw none at all."""
    font = ImageFont.load_default(size)
    return font if isinstance(font, ImageFont.FreeTypeFont) else None


@functools.lru_cache(maxsize=64)
def _file_with(needed: frozenset[str]) -> str | None:
    for path in _files(needed):
        try:
            if _has_all(ImageFont.truetype(path, PROBE_SIZE), needed):
                return path
        except (OSError, ValueError):  # not a font after all, or one of bitmaps only
            continue
    return None


def _has_all(font: ImageFont.FreeTypeFont | None, needed: frozenset[str]) -> bool:
    if font is None:
        return False
    missing = _drawn(font, _MISSING)
    return all(_drawn(font, char) != missing for char in needed)


def _drawn(font: ImageFont.FreeTypeFont, char: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(char)
    return mask.size, bytes(mask)


def _files(needed: frozenset[str]) -> Iterator[str]:
    """Font files that might do, the likeliest first, each once."""
    seen = dict.fromkeys([*_told_by_fontconfig(needed), *sorted(_in_folders(), key=_rank)])
    yield from list(seen)[:MOST_FONTS]


def _told_by_fontconfig(needed: frozenset[str]) -> list[str]:
    command = shutil.which("fc-list")
    if command is None:
        return []
    codes = " ".join(f"{ord(char):x}" for char in sorted(needed)[:100])
    try:
        done = subprocess.run(
            [command, f":charset={codes}:scalable=true", "file"],
            capture_output=True,
            text=True,
            timeout=FONTCONFIG_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return []
    return sorted((line.rstrip().rstrip(":") for line in done.stdout.splitlines()), key=_rank)


def _in_folders() -> Iterator[str]:
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    for folder in (*_FOLDERS, f"{data}/fonts"):
        for path in Path(folder).expanduser().rglob("*"):
            if path.suffix.lower() in (".ttf", ".otf", ".ttc"):
                yield str(path)


def _rank(path: str) -> tuple[int, bool, str]:
    """Well-known fonts before others, upright regular ones before bold, thin and slanted."""
    name = Path(path).name.lower().replace("-", "").replace("_", "")
    known = next((place for place, start in enumerate(_PREFERRED) if start in name), len(_PREFERRED))
    special = any(word in name for word in ("bold", "italic", "oblique", "light", "thin", "black", "mono", "condensed"))
    return known, special, path
