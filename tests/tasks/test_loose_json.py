"""Slips of models are forgiven where they leave no doubt; what JSON's own reader takes is read as it reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.tasks.loose_json import read_at, values

MEANT = {"number": "A1", "total": 3.5}


@pytest.mark.parametrize(
    "text",
    [
        '{"number": "A1", "total": 3.5}',
        "{'number': 'A1', 'total': 3.5}",
        '{"number": "A1", "total": 3.5,}',
        "{“number”: “A1”, “total”: 3.5}",
        "{‘number’: ‘A1’, ‘total’: 3.5}",
        '{"number": "A1"，"total"：3.5}',
        '{number: "A1", total: 3.5}',
        '{"number": "A1", // the number\n "total": 3.5 /* in\neuros */ }',
        '{"number": "A1", # the number\n "total": 3.5}',
        '\n {\n  "number" : "A1" ,\n  "total" : 3.5\n }',
    ],
)
def test_slips_are_forgiven(text: str) -> None:
    assert read_at(text + " and more", 0) == (MEANT, len(text))


@pytest.mark.parametrize(
    "text, value",
    [
        ("[True, False, None, true, false, null]", [True, False, None, True, False, None]),
        ("{'a': 'Bob's', 'b': 'say \"hi\"'}", {"a": "Bob's", "b": 'say "hi"'}),
        (r"{'a': 'it\'s', 'b': 'x\ny', 'c': '\u4e2d'}", {"a": "it's", "b": "x\ny", "c": "中"}),
        ('{"a": "two\nlines", "b": "{[,:\'"}', {"a": "two\nlines", "b": "{[,:'"}),
        ("{'a': {'b': [1, [2,],],},}", {"a": {"b": [1, [2]]}}),
        ("[]", []),
        ("{}", {}),
        ("[-1.5e3]", [-1500.0]),
    ],
)
def test_what_is_read(text: str, value: Any) -> None:
    assert read_at(text, 0) == (value, len(text))


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "a value is missing"),
        ("note", "a value is missing"),
        ("{", "a name is missing"),
        ("[1, 2", "a comma is missing at character 6"),
        ('{"total": 1,234.50}', "a name is missing"),
        ("{'a': b}", "a value is missing"),
        ("{'a' 1}", "a colon is missing"),
        ("[1 2]", "a comma is missing"),
        ("[,]", "a value is missing"),
        ("[01]", "a value is missing"),
        ("[NaN]", "a value is missing"),
        ("['a", "a value is missing"),
        (r"['\q']", "escape"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_in_doubt_is_no_json(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_at(text, 0)


@pytest.mark.parametrize(
    "answer, found",
    [
        ('{"a": 1}', [({"a": 1}, True)]),
        (" \n[1, 2]\n", [([1, 2], True)]),
        ('"text"', [("text", True)]),
        ('{"a": "two\nlines"}', [({"a": "two\nlines"}, True)]),
        ('Here you are: {"a": {"b": []}} - anything else?', [({"a": {"b": []}}, True)]),
        ("A [note] first [1], then {\"a\": 1} and {'b': 2,}", [([1], True), ({"a": 1}, True), ({"b": 2}, False)]),
        ("根据图片，提取的信息如下：{“a”：“中”}", [({"a": "中"}, False)]),
        ("", []),
        ("no", []),
        ("[note] {x}", []),
    ],
)
def test_values_in_talk(answer: str, found: list[tuple[Any, bool]]) -> None:
    assert list(values(answer)) == found


@pytest.mark.parametrize(
    "answer",
    ['{"a": 1', '{"a": {"b": 1}', '[{"a": 1}, {"a', '{"a": NaN}', '{"a": Infinity}', "x {total: 1,234}", "[" * 5000],
)
def test_what_stands_in_broken_json_is_not_what_was_meant(answer: str) -> None:
    with pytest.raises(ValueError, match=r" at character \d+"):
        list(values(answer))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(VALUES, st.booleans())
def test_json_is_read_as_it_is(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=1)
    assert read_at(text, 0) == (value, len(text))


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_what_python_prints_is_read_too(value: Any) -> None:
    """As models do that were taught on programs. Python chooses its quotes by what is in a text, and escapes as it
    likes: texts with a backslash may be refused, but are not read as something else."""
    text = repr(value)
    try:
        found, _ = read_at(text, 0)
    except ValueError:
        assert "\\" in text or "'" in text
    else:
        assert found == value


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="{}[]'\",: \\abTrue1.-“”\n#/", max_size=30))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        _, end = read_at(text, 0)
    except ValueError:
        return
    assert end <= len(text)
