"""Prompts against transformers' own position arithmetic, and cache keys against what must tell blocks apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.prompt import (
    OPENING_ID_BYTES,
    Control,
    Segment,
    Span,
    TextRun,
    Vision,
    block_keys,
    build,
    extend_key,
    mrope_positions,
    opening_of,
    root_key,
)
from qvl.types import Grid

START, END, IMAGE, VIDEO = 1, 2, 3, 4
MERGE = 2


def encode(text: str) -> list[int]:
    return [10 + ord(char) % 50 for char in text]


def lay(segments: list[Segment]):
    return build(segments, encode, image_pad=IMAGE, video_pad=VIDEO, merge_size=MERGE)


def vision(kind: str, t: int, h: int, w: int, digest: bytes = b"d" * 16) -> list[Segment]:
    """As the chat template writes it: start, pads, end. `h` and `w` count merged patches."""
    return [Control(START), Vision(kind, Grid(t, h * MERGE, w * MERGE), digest), Control(END)]


@pytest.fixture(scope="module")
def reference():
    """transformers' position arithmetic, on a model too small to matter."""
    import torch
    import transformers

    config = transformers.Qwen2VLConfig(
        text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                     "num_key_value_heads": 1, "vocab_size": 64,
                     "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "embed_dim": 8, "num_heads": 1, "hidden_size": 8, "spatial_merge_size": MERGE},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLModel(config)

    def positions(prompt):
        grids = {
            kind: [[span.grid.t, span.grid.h, span.grid.w] for span in prompt.spans if span.kind == kind]
            for kind in ("image", "video")
        }
        found, delta = model.get_rope_index(
            input_ids=torch.tensor([prompt.token_ids]),
            image_grid_thw=torch.tensor(grids["image"]) if grids["image"] else None,
            video_grid_thw=torch.tensor(grids["video"]) if grids["video"] else None,
        )
        return found[:, 0].numpy(), int(delta.reshape(-1)[0])

    return positions


def random_segments(rng: np.random.Generator) -> list[Segment]:
    segments: list[Segment] = [TextRun("x" * int(rng.integers(0, 9)))]
    for _ in range(int(rng.integers(0, 6))):
        if rng.random() < 0.5:
            kind, sides = "image", [1, *map(int, rng.integers(1, 9, size=2))]
        else:
            kind, sides = "video", [int(side) for side in rng.integers(1, 9, size=3)]
        segments += vision(kind, *sides, digest=f"{kind}{sides}".encode().ljust(16))
        segments.append(TextRun("y" * int(rng.integers(0, 9))))
    return segments


def test_positions_equal_the_reference_for_random_mixtures(reference):
    rng = np.random.default_rng(7)
    for _ in range(300):
        prompt = lay([*random_segments(rng), Control(END)])
        positions, delta = mrope_positions(len(prompt.token_ids), prompt.spans, MERGE)
        expected, expected_delta = reference(prompt)
        assert positions.dtype == np.int64
        np.testing.assert_array_equal(positions, expected)
        assert delta == expected_delta


def test_text_goes_on_after_the_largest_axis_of_a_video_even_when_that_is_time():
    span = Span("video", 3, 12, Grid(3, 4, 4), b"")
    positions, delta = mrope_positions(17, [span], MERGE)
    assert positions[:, 15].tolist() == [6, 6, 6]
    assert positions[0].tolist() == [0, 1, 2, *[3] * 4, *[4] * 4, *[5] * 4, 6, 7]
    assert positions[1].tolist() == [0, 1, 2, *[3, 3, 4, 4] * 3, 6, 7]
    assert positions[2].tolist() == [0, 1, 2, *[3, 4, 3, 4] * 3, 6, 7]
    assert delta == -9


def test_two_pictures():
    prompt = lay([TextRun("ab"), *vision("image", 1, 2, 2)[1:2], TextRun("c"), Vision("image", Grid(1, 4, 6), b""),
                  TextRun("de")])  # fmt: skip
    positions, delta = mrope_positions(len(prompt.token_ids), prompt.spans, MERGE)
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 2, 4, *[5] * 6, 8, 9]
    assert delta == -5


def test_text_alone_counts_up():
    positions, delta = mrope_positions(5, [], MERGE)
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert delta == 0
    assert mrope_positions(0, [], MERGE)[0].shape == (3, 0)


def test_build_places_spans_on_their_pads_and_encodes_text_runs_once():
    seen: list[str] = []

    def spy(text: str) -> list[int]:
        seen.append(text)
        return encode(text)

    digest = bytes(range(16))
    segments = [TextRun("hello <image>"), *vision("image", 1, 2, 3, digest), TextRun("!"), *vision("video", 2, 1, 1)]
    prompt = build(segments, spy, image_pad=IMAGE, video_pad=VIDEO, merge_size=MERGE)
    first, second = prompt.spans
    assert seen == ["hello <image>", "!"]
    assert (first.kind, first.offset, first.length, first.digest) == ("image", 14, 6, digest)
    assert prompt.token_ids[first.offset - 1 : first.end + 1] == [START, *[IMAGE] * 6, END]
    assert prompt.token_ids[second.offset - 1 : second.end + 1] == [START, VIDEO, VIDEO, END]
    assert len(prompt.token_ids) == 13 + 8 + 1 + 4


def picture_prompt(
    digest: bytes = b"a" * 16, before: str = "xxxxx", pads: int = 20
) -> tuple[list[int], tuple[Span, ...]]:
    prompt = lay([TextRun(before), Vision("image", Grid(1, MERGE, pads * MERGE), digest), TextRun("z" * 30)])
    return prompt.token_ids, prompt.spans


def test_one_key_per_full_block():
    ids, spans = picture_prompt()
    for length in (0, 7, 8, 9, 54, 55):
        assert len(block_keys(ids[:length], spans, 8)) == length // 8
    assert {len(key) for key in block_keys(ids, spans, 8)} == {16}


def test_another_picture_is_another_key_from_its_first_block_on():
    ours = block_keys(*picture_prompt(b"a" * 16, before="x" * 8), 4)
    other = block_keys(*picture_prompt(b"b" * 16, before="x" * 8), 4)
    assert ours[:2] == other[:2]
    assert not set(ours[2:]) & set(other)


def test_another_place_in_the_same_picture_is_another_key():
    """Blocks of equal ids under equal parents, whose pads are other pads of the picture."""
    ids = [IMAGE] * 16
    spans = [[Span("image", offset, 40, Grid(1, 2, 80), b"a" * 16)] for offset in (0, -4)]
    assert block_keys(ids, spans[0], 8)[0] != block_keys(ids, spans[1], 8)[0]


def test_a_picture_touches_only_its_own_blocks():
    """Blocks before a picture do not know of it; the ones after know it through their parent alone."""
    ids, (span,) = picture_prompt(before="x" * 8, pads=16)
    keys = block_keys(ids, (span,), 8)
    assert keys[0] == extend_key(root_key(), ids[:8])
    assert keys[1] != extend_key(keys[0], ids[8:16])
    assert keys[3] == extend_key(keys[2], ids[24:32])


def test_a_prompt_that_ends_inside_a_picture_has_the_keys_of_a_longer_one():
    ids, spans = picture_prompt(before="x" * 3, pads=61)
    keys = block_keys(ids, spans, 8)
    assert len(set(keys)) == len(keys)
    for length in range(0, len(ids), 5):
        assert block_keys(ids[:length], spans, 8) == keys[: length // 8]


def test_what_stands_before_a_picture_is_in_the_keys_of_all_its_blocks():
    ours, other = (block_keys(*picture_prompt(before=before, pads=64), 8) for before in ("x" * 8, "y" * 8))
    assert len(ours) > 8
    assert not set(ours) & set(other)


def test_pictures_in_another_order_share_the_keys_before_them_alone():
    one, two = (Vision("image", Grid(1, MERGE, 32 * MERGE), digest * 16) for digest in (b"a", b"b"))
    keys = []
    for pictures in ((one, two), (two, one)):
        prompt = lay([TextRun("x" * 8), *pictures, TextRun("z" * 8)])
        keys.append(block_keys(prompt.token_ids, prompt.spans, 8))
    assert keys[0][0] == keys[1][0]
    assert not set(keys[0][1:]) & set(keys[1][1:])


def test_two_pictures_side_by_side_are_not_one():
    ids = [IMAGE] * 8
    one = [Span("image", 0, 8, Grid(1, 2, 16), b"a" * 16)]
    two = [Span("image", 0, 4, Grid(1, 2, 8), b"a" * 16), Span("image", 4, 4, Grid(1, 2, 8), b"a" * 16)]
    swapped = [Span("image", 0, 4, Grid(1, 2, 8), b"b" * 16), Span("image", 4, 4, Grid(1, 2, 8), b"a" * 16)]
    assert len({block_keys(ids, spans, 8)[0] for spans in (one, two, swapped)}) == 3


def test_salt_keeps_tenants_apart():
    ids, spans = picture_prompt()
    assert not set(block_keys(ids, spans, 8, b"tenant a")) & set(block_keys(ids, spans, 8, b"tenant b"))
    assert block_keys(ids, spans, 8) == block_keys(ids, spans, 8, b"")


def test_a_change_of_one_token_changes_every_later_key():
    ids, spans = picture_prompt()
    changed = [*ids[:30], ids[30] + 1, *ids[31:]]
    ours, other = block_keys(ids, spans, 8), block_keys(changed, spans, 8)
    assert ours[:3] == other[:3]
    assert not set(ours[3:]) & set(other)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 17), st.binary(max_size=4))
def test_keys_extend_block_by_block(seed, block_size, salt):
    """Computed while a sequence grows or all at once, keys are the same: with pictures across block borders too."""
    prompt = lay(random_segments(np.random.default_rng(seed)))
    ids = [*prompt.token_ids, *range(20)]
    keys = block_keys(ids, prompt.spans, block_size, salt)
    parent = root_key(salt)
    for number, key in enumerate(keys):
        start = number * block_size
        end = start + block_size
        if not any(span.offset <= start and end <= span.end for span in prompt.spans):  # no answer ends such a block
            assert key == extend_key(parent, ids[start:end], prompt.spans, start)
        parent = key


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9))
def test_openings_tell_what_two_blocks_have_in_common(seed, block_size):
    """By brute force: tokens of two prompts are the same while ids, pictures and places in them are."""
    rng = np.random.default_rng(seed)
    segments = random_segments(rng)
    prompts = [lay([*segments[: rng.integers(len(segments) + 1)], *random_segments(rng)]) for _ in range(2)]

    def tokens(prompt):
        inside = {i: (span.digest, i - span.offset) for span in prompt.spans for i in range(span.offset, span.end)}
        return [inside.get(i, token) for i, token in enumerate(prompt.token_ids)]

    one, two = map(tokens, prompts)
    same = next(
        (i for i, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), min(len(one), len(two))
    )
    start = same // block_size * block_size
    openings = []
    for prompt in prompts:
        parent = [root_key(), *block_keys(prompt.token_ids, prompt.spans, block_size)][start // block_size]
        ids = prompt.token_ids[start : start + block_size]
        openings.append(opening_of(parent, ids, prompt.spans, start))
    if None in openings:  # nothing but a picture in one of them
        return
    first, second = openings
    shared = 0
    if first.family == second.family:
        pairs = zip(first.ids, second.ids, strict=False)
        shared = next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(first.ids), len(second.ids)))
    assert start + shared // OPENING_ID_BYTES <= same
    begins = [span.offset for prompt in prompts for span in prompt.spans if start < span.offset]
    inside = [span for prompt in prompts for span in prompt.spans if span.offset <= start < span.end]
    if len(inside) == 0 or (len(inside) == 2 and inside[0].digest == inside[1].digest):
        assert start + shared // OPENING_ID_BYTES >= min([same, *begins])


def test_an_opening_ends_before_a_picture_and_has_none_inside_of_one():
    ids, (span,) = picture_prompt(before="xxxxx", pads=20)
    assert (span.offset, span.end) == (5, 25)
    before = opening_of(root_key(), ids[:8], (span,), 0)
    assert len(before.ids) == 5 * OPENING_ID_BYTES
    assert opening_of(b"parent", ids[8:16], (span,), 8) is None
    behind = opening_of(b"parent", ids[24:32], (span,), 24)
    assert len(behind.ids) == 8 * OPENING_ID_BYTES
    assert behind.family != b"parent"
    other = replace(span, digest=b"b" * 16)
    assert opening_of(b"parent", ids[24:32], (other,), 24).family != behind.family
    assert opening_of(b"parent", ids[25:33], (span,), 25).family == b"parent"
