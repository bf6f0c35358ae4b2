"""The whole path: sizes a request may ask for, grids and tokens, and which media are the same picture."""

from __future__ import annotations

import base64
import dataclasses
import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from qvl.errors import BadMedia, InvalidRequest, MediaRefused, PayloadTooLarge
from qvl.media import load as load_module
from qvl.media.fetch import MediaPolicy
from qvl.media.load import LoadedMedia, Once, keep_pictures, load
from qvl.media.resize import resize_bicubic, smart_resize
from qvl.media.sizes import picture_size
from qvl.specs import ProcessorSpec
from qvl.types import Grid, MediaPart, PixelLimits
from tests.media.conftest import clip, png

SPEC = ProcessorSpec()
POLICY = MediaPolicy()


def take(
    source, kind="image", *, spec=SPEC, policy=POLICY, server: PixelLimits = PixelLimits(), here=True, **limits
) -> LoadedMedia:
    return load(MediaPart(kind, source, PixelLimits(**limits)), spec, policy, server, resize_here=here)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


# -- pictures


def test_a_picture():
    loaded = take(png("red", (300, 200)))
    assert loaded.kind == "image"
    assert (loaded.height, loaded.width) == (196, 308)
    assert loaded.pixels.shape == (1, 196, 308, 3)
    assert loaded.pixels.flags.c_contiguous
    assert loaded.grid == Grid(1, 14, 22)
    assert loaded.num_tokens == 77
    assert loaded.original_size == (200, 300)
    assert len(loaded.digest) == 16


def test_a_source_that_is_read_once(monkeypatch):
    decoded = []
    real = load_module.decode_image
    monkeypatch.setattr(load_module, "decode_image", lambda *a, **k: (decoded.append(1), real(*a, **k))[1])
    once = Once(png("red", (300, 200)))
    first = take(once)
    assert take(once) is first
    assert decoded == [1]
    assert first.digest == take(png("red", (300, 200))).digest
    once.forget()
    assert take(once).digest == first.digest
    assert decoded == [1] * 3
    broken = Once(b"no picture")
    for _ in range(2):
        with pytest.raises(BadMedia):
            take(broken)


def test_the_device_gets_the_pixels_as_they_are():
    picture = noise(200, 300)
    there = take(picture, here=False)
    assert (there.height, there.width, there.grid) == (196, 308, Grid(1, 14, 22))
    np.testing.assert_array_equal(there.pixels[0], picture)
    np.testing.assert_array_equal(take(picture).pixels[0], resize_bicubic(picture, 196, 308))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 1), (27, 27), (1, 200)])
def test_tiny_pictures_are_enlarged(size):
    loaded = take(noise(*size))
    assert loaded.num_tokens >= 4
    assert loaded.num_tokens == loaded.height * loaded.width // 28**2


def test_ratio_201_is_refused():
    with pytest.raises(BadMedia, match="200"):
        take(noise(1, 201))


def test_every_way_to_name_a_file_gives_the_same_picture(site, tmp_path):
    picture = noise(40, 60)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    data = file.getvalue()
    site.files["n.png"] = data
    (tmp_path / "n.png").write_bytes(data)
    policy = MediaPolicy(allow_private_hosts=True, allowed_local_path=tmp_path)
    files = [data, bytearray(data), site.url("n.png"), tmp_path / "n.png", "n.png", f"file://{tmp_path}/n.png",
             "data:image/png;base64," + base64.b64encode(data).decode()]  # fmt: skip
    assert len({take(source, policy=policy).digest for source in files}) == 1
    assert take(picture).digest == take(Image.fromarray(picture)).digest


def test_a_file_that_comes_again_is_decoded_once(monkeypatch):
    decoded = []
    real = load_module.decode_image
    monkeypatch.setattr(load_module, "decode_image", lambda *a, **k: (decoded.append(1), real(*a, **k))[1])
    kept = keep_pictures()

    def taken(source, **limits) -> LoadedMedia:
        return load(MediaPart("image", source), SPEC, POLICY, PixelLimits(**limits), resize_here=True, kept=kept)

    red, blue = png("red", (300, 200)), png("blue", (300, 200))
    first = taken(red)
    assert taken("data:image/png;base64," + base64.b64encode(red).decode()) is first
    assert decoded == [1]
    small, other = taken(red, max_pixels=20_000), taken(blue)
    assert decoded == [1] * 3
    assert len({first.digest, small.digest, other.digest}) == 3
    assert small.pixels.shape != first.pixels.shape
    np.testing.assert_array_equal(first.pixels, take(red).pixels)
    np.testing.assert_array_equal(other.pixels, take(blue).pixels)
    assert kept.used_bytes == sum(one.pixels.nbytes for one in (first, small, other))
    for _ in range(2):
        with pytest.raises(BadMedia):
            taken(red[:-40])


@pytest.mark.parametrize("source", [None, 7, ["a"], {"url": "x"}, object()])
def test_other_things_are_no_picture(source):
    with pytest.raises(BadMedia, match="a picture is given as"):
        take(source)
    if not isinstance(source, list):
        with pytest.raises(BadMedia, match="a video is given as"):
            take(source, "video")


def test_policy_reaches_every_picture(site):
    with pytest.raises(MediaRefused):
        take(site.url("red.png"))
    with pytest.raises(MediaRefused):
        take([site.url("red.png")], "video")
    with pytest.raises(MediaRefused):
        take("/etc/passwd")
    with pytest.raises(PayloadTooLarge):
        take(png("red"), policy=dataclasses.replace(POLICY, max_bytes=10))
    with pytest.raises(BadMedia, match="at most 100 pixels"):
        take(png("red"), policy=dataclasses.replace(POLICY, max_image_pixels=100))
    assert site.seen == []


# -- sizes a request asks for


def test_a_request_lowers_and_raises_the_size():
    picture = noise(300, 400)
    plain = take(picture)
    lowered = take(picture, max_pixels=50_000)
    raised = take(picture, min_pixels=500_000)
    assert (plain.height, plain.width) == (308, 392)
    assert lowered.height * lowered.width <= 50_000
    assert raised.height * raised.width >= 500_000
    assert (lowered.height, lowered.width) == smart_resize(300, 400, factor=28, min_pixels=3136, max_pixels=50_000)
    assert (raised.height, raised.width) == smart_resize(
        300, 400, factor=28, min_pixels=500_000, max_pixels=SPEC.max_pixels
    )


def test_a_request_overrides_the_servers_choice_but_not_the_checkpoint():
    server = PixelLimits(max_pixels=50_000)
    large = (3000, 4000)
    assert picture_size(*large, SPEC, server) == picture_size(*large, SPEC, PixelLimits(max_pixels=50_000))
    assert take(noise(300, 400), server=server).num_tokens <= 50_000 // 784
    assert take(noise(300, 400), server=server, max_pixels=10**6).num_tokens == take(noise(300, 400)).num_tokens
    for wish in (10**9, 2**62):
        assert picture_size(9000, 9000, SPEC, PixelLimits(max_pixels=wish)) == picture_size(
            9000, 9000, SPEC, PixelLimits()
        )


@pytest.mark.parametrize(
    ("limits", "param"),
    [
        ({"min_pixels": 0}, "min_pixels"),
        ({"min_pixels": -5}, "min_pixels"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"max_pixels": 783}, "max_pixels"),
        ({"min_pixels": 200_000, "max_pixels": 100_000}, "min_pixels"),
        ({"min_pixels": SPEC.max_pixels + 1}, "min_pixels"),
        ({"min_pixels": 2**62, "max_pixels": 2**63}, "min_pixels"),
    ],
)
def test_limits_that_cannot_act_name_their_field(limits, param):
    for kind, source in (("image", noise(30, 30)), ("video", noise(30, 30)[None])):
        with pytest.raises(InvalidRequest) as caught:
            take(source, kind, **limits)
        assert caught.value.param == param


# -- digests


def test_other_pictures_have_other_digests():
    picture = noise(56, 112)
    changed = picture.copy()
    changed[55, 111, 2] ^= 1
    distinct = [
        take(picture),
        take(changed),
        take(picture.reshape(112, 56, 3)),  # the same bytes in another shape
        take(picture.transpose(1, 0, 2)),
        take(picture, min_pixels=50_000),
        take(picture[None], "video"),
        take(np.stack([picture, picture]), "video"),
    ]
    assert len({loaded.digest for loaded in distinct}) == len(distinct)


def test_the_same_bytes_under_another_palette_or_mode_are_another_picture():
    """CVE-2025-46722: a hash of the raw index bytes took these for one."""
    indices = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    pictures = [Image.fromarray(indices)]
    for seed in (1, 2):
        palette = Image.frombytes("P", (64, 64), indices.tobytes())
        palette.putpalette(np.random.default_rng(seed).integers(0, 256, 768, dtype=np.uint8).tobytes())
        pictures.append(palette)
    assert len({take(picture).digest for picture in pictures}) == 3


def test_files_of_the_same_bytes_under_another_palette_are_other_pictures():
    indices = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    digests = set()
    for seed in (1, 2):
        picture = Image.frombytes("P", (64, 64), indices.tobytes())
        picture.putpalette(np.random.default_rng(seed).integers(0, 256, 768, dtype=np.uint8).tobytes())
        file = io.BytesIO()
        picture.save(file, "PNG")
        digests.add(take(file.getvalue()).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    "change",
    [{"image_mean": (0.5, 0.5, 0.5)}, {"image_std": (0.5, 0.5, 0.5)}, {"patch_size": 7, "merge_size": 4},
     {"temporal_patch_size": 1}, {"min_pixels": 50_000}],
)  # fmt: skip
def test_other_processor_settings_have_other_digests(change):
    picture = noise(56, 112)
    assert take(picture).digest != take(picture, spec=dataclasses.replace(SPEC, **change)).digest


def test_the_target_size_counts_when_the_device_resizes():
    picture = noise(300, 400)
    assert take(picture, here=False).digest != take(picture, here=False, max_pixels=50_000).digest


def test_the_shape_counts_when_the_device_resizes():
    bytes_of_both = np.arange(27 * 28 * 3, dtype=np.uint8)
    wide, tall = (take(bytes_of_both.reshape(*size, 3), here=False, min_pixels=1) for size in ((27, 28), (28, 27)))
    assert (wide.height, wide.width) == (tall.height, tall.width) == (28, 28)
    assert wide.digest != tall.digest


def test_large_arrays_are_neither_copied_nor_hashed_through_a_copy():
    picture = noise(2000, 3000)
    take(picture[:8, :8], here=False)
    tracemalloc.start()
    loaded = take(picture, here=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.shares_memory(loaded.pixels, picture)
    assert peak < picture.nbytes // 10


# -- videos


def frames_of(count: int, height: int = 60, width: int = 80) -> np.ndarray:
    return np.stack([noise(height, width, seed) for seed in range(count)])


def test_a_video_file():
    loaded = take(clip(list(range(0, 240, 8))), "video", here=False)
    assert loaded.kind == "video"
    assert loaded.pixels.shape == (6, 48, 64, 3)
    assert loaded.original_size == (48, 64)
    assert (loaded.height, loaded.width) == smart_resize(48, 64, factor=28, min_pixels=100_352, max_pixels=602_112)
    assert loaded.grid == Grid(3, loaded.height // 14, loaded.width // 14)
    assert loaded.num_tokens == 3 * (loaded.height // 28) * (loaded.width // 28)
    assert take(clip(list(range(0, 240, 8))), "video").pixels.shape == (6, loaded.height, loaded.width, 3)


def test_a_list_of_frames_in_any_spelling(site, tmp_path):
    files = [png(colour) for colour in ("red", "lime", "blue")]
    site.files["b.png"] = files[1]
    (tmp_path / "c.png").write_bytes(files[2])
    policy = MediaPolicy(allow_private_hosts=True, allowed_local_path=tmp_path)
    mixed = [Image.open(io.BytesIO(files[0])), site.url("b.png"), "c.png"]
    loaded = take(mixed, "video", policy=policy, here=False)
    assert loaded.pixels[:, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    for source in (tuple(files), loaded.pixels, list(loaded.pixels)):
        assert take(source, "video", here=False).digest == loaded.digest


def test_an_odd_last_frame_fills_a_slice_of_its_own():
    assert take(frames_of(3), "video").grid.t == 2
    assert take(frames_of(4), "video").grid.t == 2
    assert take(frames_of(1), "video").grid.t == 1


def test_the_caller_chose_the_frames_of_a_list():
    assert len(take(frames_of(7), "video").pixels) == 7
    chosen = take(frames_of(9), "video", num_frames=4, here=False)
    np.testing.assert_array_equal(chosen.pixels, frames_of(9)[[0, 3, 5, 8]])
    assert len(take(frames_of(7), "video", fps=1.0).pixels) == 7


def test_frames_as_base64_jpegs():
    files = []
    for level in (0, 100, 200):
        file = io.BytesIO()
        Image.new("L", (32, 32), level).save(file, "JPEG")
        files.append(base64.b64encode(file.getvalue()).decode())
    loaded = take("data:video/jpeg;base64," + ",".join(files), "video", here=False)
    assert np.abs(loaded.pixels[:, 9, 9, 0].astype(int) - [0, 100, 200]).max() <= 2


def test_a_hundred_thousand_frames_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(load_module, "decode_image", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(BadMedia, match="100000 frames"):
        take("data:video/jpeg;base64," + ",".join(["AAAA"] * 100_000), "video")
    with pytest.raises(BadMedia, match="100000 frames"):
        take([b"x"] * 100_000, "video")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ([], "no frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no frames"),
        (np.zeros((4, 4, 3), np.uint8), "not a video"),
        (np.zeros((2, 4, 4, 3)), "not a picture"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "same size"),
        ([b"broken"], "not a picture"),
        (b"broken", "cannot be decoded"),
        ("data:video/mp4;base64,AAAA", "cannot be decoded"),
        (np.zeros((2, 1, 201, 3), np.uint8), "200"),
    ],
)
def test_bad_videos(source, match):
    with pytest.raises(BadMedia, match=match):
        take(source, "video")


def test_a_size_by_name_needs_both_sides_and_no_extreme_ratio():
    with pytest.raises(InvalidRequest, match="together"):
        take(noise(30, 40), resized_height=280)
    with pytest.raises(BadMedia, match="200 times"):
        take(noise(30, 40), resized_height=28, resized_width=28 * 201)


def test_frames_from_the_network_share_one_time_limit(site):
    """Each frame takes 0.2 s, far below the limit; five of them reach it."""
    take([site.url("slow")] * 2, "video", policy=MediaPolicy(allow_private_hosts=True))
    site.seen.clear()
    policy = MediaPolicy(allow_private_hosts=True, total_timeout=1.0)
    with pytest.raises(BadMedia, match=r"in time|too long"):
        take([site.url("slow")] * 20, "video", policy=policy)
    assert len(site.seen) < 10
