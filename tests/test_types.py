"""What a program may write into `SamplingParams`: the wire has checked types before, a program has not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qvl.errors import InvalidRequest
from qvl.types import SamplingParams, check_api_key


def test_nothing_may_be_said_as_none() -> None:
    empty: dict[str, Any] = {"stop": None, "stop_token_ids": None, "logit_bias": None}
    assert SamplingParams(**empty) == SamplingParams()
    one: Any = "a"
    assert SamplingParams(stop=one).stop == ("a",)
    assert SamplingParams(max_tokens=np.int64(3), top_k=np.int32(5)).max_tokens == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_tokens": "3"}, "'max_tokens' must be a whole number"),
        ({"max_tokens": 3.0}, "'max_tokens' must be a whole number"),
        ({"max_tokens": True}, "'max_tokens' must be a whole number"),
        ({"max_tokens": 0}, "'max_tokens' must be at least 1"),
        ({"min_tokens": None}, "'min_tokens' must be a whole number"),
        ({"n": 1.5}, "'n' must be a whole number"),
        ({"n": None}, "'n' must be a whole number"),
        ({"top_k": "all"}, "'top_k' must be a whole number"),
        ({"seed": "x"}, "'seed' must be a whole number"),
        ({"logprobs": 2.5}, "'logprobs' must be a whole number"),
        ({"temperature": "hot"}, "'temperature' must be a number"),
        ({"stop": [3]}, "'stop' must be strings"),
        ({"stop": [""]}, "'stop' must be strings"),
    ],
)
def test_what_is_of_another_type_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        SamplingParams(**given)


def test_a_key_that_no_header_carries_is_refused() -> None:
    check_api_key("sk-a1_B2.c3")
    for key in ("two\nlines", "钥匙", "end\n"):
        with pytest.raises(InvalidRequest, match="the API key has characters that no header carries"):
            check_api_key(key)
