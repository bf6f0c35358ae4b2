"""Languages by code and by name. Data, and one look-up."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qvl.errors import InvalidRequest

NAMES = {
    "ar": "Arabic",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "ms": "Malay",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "zh": "Chinese",
    "zh-hant": "Traditional Chinese",
}
_ALIASES = {"zh-cn": "zh", "zh-hans": "zh", "cn": "zh", "zh-tw": "zh-hant", "zh-hk": "zh-hant", "jp": "ja", "kr": "ko"}
_BY_NAME = {name.lower(): code for code, name in NAMES.items()} | {
    "中文": "zh",
    "英文": "en",
    "simplified chinese": "zh",
}


@dataclass(frozen=True, slots=True)
class LanguageName:
    """`name` is English; `code` is empty for a language that stands in no list here."""

    code: str
    name: str


def language(given: str) -> LanguageName:
    """From a code ("zh", "pt-BR") or a name, in any case. Raises `InvalidRequest` for an unknown code.

    A name that is not known is taken as it is: the model may know it.
    """
    key = given.strip().lower().replace("_", "-")
    code = _ALIASES.get(key, key)
    code = code if code in NAMES else _BY_NAME.get(key, code.split("-")[0] if "-" in code else code)
    if code in NAMES:
        return LanguageName(code, NAMES[code])
    if len(key) <= 3 or not re.fullmatch(r"[\w' -]{4,60}", given.strip()):
        raise InvalidRequest(f"'{given}' is no language: give a code (zh, en, fr, ...) or a name (Swahili)")
    return LanguageName("", given.strip())
