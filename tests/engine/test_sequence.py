"""One request's state: positions, keys and what it says about itself."""

from __future__ import annotations

import numpy as np
import pytest

from qvl.engine.sequence import SamplingState, Sequence, Status
from qvl.prompt import OPENING_ID_BYTES, block_keys, mrope_positions, root_key
from qvl.types import SamplingParams
from tests.engine.fake_model import EOS, request, tiny_spec

SPEC = tiny_spec()
A, B = b"A" * 16, b"B" * 16


def make(parts: list[int | tuple[int, bytes]], block_size: int = 4, sampling: SamplingParams | None = None) -> Sequence:
    return Sequence.create(request("r", parts, sampling, b"salt"), SPEC, block_size=block_size, fallback_seed=3)


def test_positions_go_on_after_the_prompt_by_the_delta() -> None:
    seq = make([1, (6, A), 2])
    for token in range(5):
        seq.append(token)
    # The whole answer as if it had been in the prompt: the text after a picture counts on from its largest index.
    whole, _ = mrope_positions(13, seq.spans, SPEC.vision.merge_size)
    for start in range(13):
        for count in range(14 - start):
            np.testing.assert_array_equal(seq.positions(start, count), whole[:, start : start + count])
    assert seq.positions(7, 2).dtype == np.int64


@pytest.mark.parametrize("block_size", [1, 3, 4, 7])
@pytest.mark.parametrize("parts", [[1], [1, 2, 3], [(2, A), 1], [1, (5, A), (3, B), 9]])
def test_keys_of_generated_blocks_are_those_of_a_prompt(parts: list[int | tuple[int, bytes]], block_size: int) -> None:
    seq = make(parts, block_size)
    for token in range(20):
        seq.append(token)
        assert seq.keys == block_keys(seq.token_ids, seq.spans, block_size, b"salt")


def test_spans_in_a_range_of_tokens() -> None:
    seq = make([1, (3, A), 2, (2, B)])  # pictures at [1, 4) and [5, 7)
    assert [seq.spans_in(start, 1) for start in range(7)] == [[], [0], [0], [0], [], [1], [1]]
    assert seq.spans_in(3, 3) == [0, 1]
    assert seq.spans_in(4, 1) == []


def test_counts_through_prefill_decode_and_preemption() -> None:
    seq = make([1, 2, 3])
    assert (seq.num_to_compute, seq.is_decoding, seq.num_output) == (3, False, 0)
    seq.start_running([0], 0)
    seq.num_computed = 2
    assert (seq.num_to_compute, seq.is_decoding) == (1, False)  # one token, but of the prompt
    seq.num_computed = 3
    seq.append(9)
    assert (seq.num_to_compute, seq.is_decoding, seq.num_output) == (1, True, 1)
    seq.reset()
    assert (seq.num_to_compute, seq.is_decoding, seq.num_preemptions) == (4, False, 1)
    assert seq.status is Status.WAITING


def test_what_the_cache_had_is_what_the_first_admission_found() -> None:
    seq = make([1] * 9)
    seq.num_computed = 5
    seq.start_running([0, 1, 2], 1)
    seq.reset()
    seq.num_computed = 8
    seq.start_running([3, 4, 5], 2)
    assert (seq.num_cached_tokens, seq.num_registered) == (5, 2)


def test_openings_are_those_of_the_prompt() -> None:
    seq = make([1] * 6)
    assert seq.block_size == 4
    for _ in range(6):
        seq.append(1)
    first, second, third = (seq.opening(index) for index in range(3))
    assert first is not None and second is not None and third is None
    assert (len(first.ids), len(second.ids)) == (4 * OPENING_ID_BYTES, 2 * OPENING_ID_BYTES)
    assert first.family == root_key(seq.salt)
    assert second.family == seq.keys[0]


def test_an_end_token_counts_behind_min_tokens_only() -> None:
    state = SamplingState.create(SamplingParams(min_tokens=2, stop_token_ids=(5,)), EOS, 3)
    for token in (5, *EOS):
        assert [state.ends(token, number) for number in (1, 2, 3)] == [False, False, True]
    assert [set(state.banned(number)) for number in (0, 1, 2)] == [{5, *EOS}, {5, *EOS}, set()]


def test_a_sequence_ends_once_and_lets_go_of_its_pixels() -> None:
    asked = request("r", [(2, A)])
    seq = Sequence.create(asked, SPEC, block_size=4, pixels=[np.zeros((1, 28, 56, 3), np.uint8)])
    assert seq.pixels[0] is not None
    seq.end("stop")
    assert (seq.pixels, seq.finish_reason) == ([None], "stop")
    with pytest.raises(AssertionError):
        seq.end("abort")


def test_seeds() -> None:
    assert make([1]).sampling.seed == 3
    assert SamplingState.create(SamplingParams(seed=7), EOS, 3).seed == 7
    negative = SamplingState.create(SamplingParams(seed=-1), EOS, 3).seed
    assert 0 <= negative < 2**63
    drawn = {Sequence.create(request("r", [1]), SPEC, block_size=4).sampling.seed for _ in range(4)}
    assert len(drawn) == 4
