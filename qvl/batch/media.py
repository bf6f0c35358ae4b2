"""Pictures and videos of this machine that lines name by path: what the one who answers can read.

Knows files. Does not look into them, and leaves every other address as it is.
"""

from __future__ import annotations

import base64
import mimetypes
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qvl.batch.lines import Localise
from qvl.errors import InvalidRequest
from qvl.types import MediaKind

_ELSEWHERE = ("http://", "https://", "data:")


def as_paths(base: Path) -> Localise:
    """Absolute paths, for an engine on this machine; relative ones start at `base`."""
    return lambda address, _: str(_path_of(address, base)) if _is_here(address) else address


def as_data_urls(base: Path) -> Localise:
    """Data URLs, for a server that may stand anywhere; relative paths start at `base`."""
    return lambda address, kind: _data_url(_path_of(address, base), kind) if _is_here(address) else address


def _is_here(address: str) -> bool:
    return not address.lower().startswith(_ELSEWHERE)


def _path_of(address: str, base: Path) -> Path:
    is_url = address.lower().startswith("file://")
    return base / os.path.expanduser(unquote(urlsplit(address).path) if is_url else address)


def _data_url(path: Path, kind: MediaKind) -> str:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    mime = mimetypes.guess_type(path.name)[0] or ""
    known = mime.startswith(f"{kind}/") or mime == "image/gif"
    return f"data:{mime if known else 'application/octet-stream'};base64,{base64.b64encode(data).decode()}"
