"""What a typed or pasted line of `qvl chat` means: a command, pictures and videos, or words.

Pure but for looking whether a file exists. Does not know the terminal or the conversation.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qvl.client import media_kind, screen_part
from qvl.errors import InvalidRequest, suggest
from qvl.types import MediaKind, MediaPart

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".avif")


@dataclass(frozen=True, slots=True)
class Order:
    """A command with what stands behind it."""

    name: str
    rest: str


@dataclass(frozen=True, slots=True)
class Words:
    """A turn: its text (may be empty) and the pictures and videos named in it."""

    text: str
    media: tuple[MediaPart, ...]


def read_line(line: str, commands: tuple[str, ...]) -> Order | Words:
    """Raises `InvalidRequest` for a command that there is not."""
    line = line.strip()
    name, _, rest = line.partition(" ")
    if name in commands:
        return Order(name, rest.strip())
    whole = named_medium(line)
    if whole is not None:
        return Words("", (whole,))
    words = _words(line)
    found = {word: medium for word in words if (medium := named_medium(word)) is not None}
    if re.fullmatch(r"/[a-z]+", name) and name not in found:
        raise InvalidRequest(f"there is no command {name}{suggest(name, commands)}; /help lists them")
    if not found:
        return Words(line, ())
    return Words(" ".join(word for word in words if word not in found), tuple(found.values()))


def named_medium(word: str) -> MediaPart | None:
    """The picture or video that `word` names by its path, quoted or not, or by its address; None for other words."""
    word = _unquoted(word)
    if word.startswith(("http://", "https://")):
        path = urlsplit(word).path.lower()
        return MediaPart(media_kind(word), word) if path.endswith(_PICTURES) or media_kind(word) == "video" else None
    if not word.lower().endswith(_PICTURES) and media_kind(word) != "video":
        return None
    path_ = local_path(word)
    return MediaPart(media_kind(path_), path_) if path_.is_file() else None


def given_medium(word: str, kind: MediaKind) -> MediaPart:
    """What follows `/image` or `/video`. Raises `InvalidRequest` where there is no such file or screen."""
    word = _unquoted(word)
    if word.startswith(("http://", "https://", "data:")):
        return MediaPart(kind, word)
    if kind == "image" and (screen := screen_part(word)) is not None:
        return screen
    path = local_path(word)
    if word and path.is_dir():
        raise InvalidRequest(f"{word} is a folder; name one file of it")
    if not word or not path.is_file():
        raise InvalidRequest(f"no such file: {word}" if word else f"name a file: /{kind} FILE")
    return MediaPart(kind, path)


def local_path(word: str) -> Path:
    """A path as a person or a file manager writes it: quoted, escaped, with ~, or as a file:// address."""
    word = _unquoted(word)
    if word.startswith("file://"):
        word = unquote(urlsplit(word).path)
    return Path(os.path.expanduser(word))


def _unquoted(word: str) -> str:
    """What a terminal pastes for a dropped file is quoted or escaped for a shell."""
    word = word.strip()
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        return word[1:-1]
    return re.sub(r"\\(.)", r"\1", word) if "\\" in word and not Path(word).exists() else word


def _words(line: str) -> list[str]:
    """Split as a shell would, where quotes are balanced; an apostrophe is no quote."""
    try:
        words = shlex.split(line)
    except ValueError:
        words = []
    return words if any(named_medium(word) for word in words) else line.split()
