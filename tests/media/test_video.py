"""Sampling against the reference's arithmetic; decoding of every container; broken and hostile files."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qvl.errors import BadMedia, InvalidRequest
from qvl.media import video
from qvl.media.fetch import MediaPolicy
from qvl.media.resize import resize_bicubic
from qvl.media.video import Clip, FrameStack, decode_video, sample_indices
from qvl.specs import ProcessorSpec
from qvl.types import PixelLimits
from tests.media.conftest import clip

SPEC = ProcessorSpec()
POLICY = MediaPolicy()


def fit(num_frames: int, height: int, width: int) -> tuple[int, int]:
    return 28, 56


def decode(data: bytes, *, policy: MediaPolicy = POLICY, resize_here: bool = False, **limits) -> Clip:
    return decode_video(data, PixelLimits(**limits), SPEC, policy, fit=fit, resize_here=resize_here)


def levels_of(decoded: Clip) -> list[int]:
    return decoded.frames[:, 5, 5, 0].tolist()


# -- which frames


def reference_count(total: int, native_fps: float, fps: float) -> int:
    """As the checkpoint's authors compute it (qwen-vl-utils), for clips long enough for it."""
    most = min(768, total) // 2 * 2
    return round(min(max(total / native_fps * fps, 4), most) / 2) * 2


@settings(max_examples=400, deadline=None)
@given(
    st.integers(4, 5000),
    st.sampled_from([5.0, 10.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0]),
    st.sampled_from([0.5, 1.0, 2.0, 7.3]),
)
def test_counts_and_indices_equal_the_reference(total, native_fps, fps):
    indices = sample_indices(total, native_fps, PixelLimits(fps=fps), SPEC)
    count = reference_count(total, native_fps, fps)
    assert len(indices) == count
    # Exact arithmetic: an odd number of steps never lands half way between two frames, so rounding is never a choice.
    assert indices.tolist() == [round(Fraction(i * (total - 1), count - 1)) for i in range(count)]


def test_indices_equal_torch_where_its_float32_can_tell_frames_apart():
    import torch

    for total in range(4, 700, 3):
        indices = sample_indices(total, 30.0, PixelLimits(), SPEC)
        expected = torch.linspace(0, total - 1, len(indices)).round().long()
        assert indices.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("total", "limits", "count"),
    [
        (0, {}, 0),
        (1, {}, 1),
        (2, {}, 2),
        (3, {}, 2),
        (5, {}, 4),
        (10**6, {}, 768),
        (300, {}, 20),
        (300, {"fps": 0.001}, 4),
        (300, {"fps": 1000.0}, 300),
        (300, {"num_frames": 1}, 2),
        (300, {"num_frames": 7}, 8),
        (300, {"num_frames": 16}, 16),
        (10, {"num_frames": 16}, 10),
        (300, {"num_frames": 16, "fps": 9.0}, 16),
        (10**6, {"num_frames": 768}, 768),
    ],
)
def test_counts(total, limits, count):
    indices = sample_indices(total, 30.0, PixelLimits(**limits), SPEC)
    assert len(indices) == count
    assert indices.dtype == np.int64
    if count > 1:
        assert (indices[0], indices[-1]) == (0, total - 1)
        assert (np.diff(indices) > 0).all()


@pytest.mark.parametrize(
    "limits",
    [{"fps": 0.0}, {"fps": -1.0}, {"fps": float("nan")}, {"fps": float("inf")}, {"num_frames": 0}, {"num_frames": 769}],
)
def test_sampling_that_cannot_act_names_its_field(limits):
    with pytest.raises(InvalidRequest) as caught:
        sample_indices(300, 30.0, PixelLimits(**limits), SPEC)
    assert caught.value.param == next(iter(limits))


# -- files

LEVELS = list(range(0, 240, 8))  # 30 frames, 3 seconds: 6 are sampled


def needs_encoder(codec: str) -> None:
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this build cannot write {codec}")


@pytest.mark.parametrize(
    ("container", "codec", "pixel_format", "tolerance"),
    [
        ("matroska", "ffv1", "bgr0", 0),
        ("avi", "png", "rgb24", 0),
        ("apng", "apng", "rgb24", 0),
        ("gif", "gif", "gray", 0),
        ("mp4", "mpeg4", "yuv420p", 6),
        ("mpegts", "mpeg4", "yuv420p", 6),
        ("avi", "mjpeg", "yuvj420p", 6),
        ("webm", "libvpx-vp9", "yuv420p", 6),
        ("mp4", "libx264", "yuv420p", 6),
    ],
)
def test_containers_and_codecs(container, codec, pixel_format, tolerance):
    needs_encoder(codec)
    data = clip(LEVELS, container=container, codec=codec, pixel_format=pixel_format)
    decoded = decode(data)
    expected = [LEVELS[index] for index in (0, 6, 12, 17, 23, 29)]
    assert decoded.frames.shape == (6, 48, 64, 3)
    assert decoded.frames.dtype == np.uint8
    assert np.abs(np.array(levels_of(decoded)) - expected).max() <= tolerance
    assert decoded.size == (48, 64)
    assert decoded.fps == pytest.approx(2.0)


def test_fractional_rates_are_kept():
    decoded = decode(clip(LEVELS, rate=Fraction(30000, 1001)), num_frames=10)
    assert decoded.fps == pytest.approx(30000 / 1001 / 3)


def test_requests_choose_frames():
    data = clip(LEVELS)
    assert len(decode(data, fps=4.0).frames) == 12
    assert levels_of(decode(data, num_frames=2)) == [0, 232]
    assert levels_of(decode(data, num_frames=30)) == LEVELS


def test_an_animated_gif_is_a_video():
    frames = [Image.new("L", (20, 10), level) for level in (0, 50, 100, 150, 200)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    assert levels_of(decode(file.getvalue())) == [0, 50, 150, 200]


def test_one_and_two_frames():
    assert levels_of(decode(clip([7]))) == [7]
    assert levels_of(decode(clip([7, 9]))) == [7, 9]


def test_raw_stream_without_any_frame_count():
    needs_encoder("libx264")
    data = clip(LEVELS, container="h264", codec="libx264", pixel_format="yuv420p")
    decoded = decode(data, num_frames=4)
    assert np.abs(np.array(levels_of(decoded)) - [LEVELS[i] for i in (0, 10, 19, 29)]).max() <= 6


@pytest.mark.parametrize("claimed", [4, 20, 29, 31, 40, 1000])
def test_a_wrong_count_is_found_out(claimed, monkeypatch):
    monkeypatch.setattr(video, "_probe", lambda *_: (claimed, 10.0))
    assert levels_of(decode(clip(LEVELS))) == [LEVELS[index] for index in (0, 6, 12, 17, 23, 29)]


def test_a_clip_that_does_not_say_its_rate_is_sampled_in_full(monkeypatch):
    monkeypatch.setattr(video, "_probe", lambda *_: (30, None))
    decoded = decode(clip(LEVELS))
    assert levels_of(decoded) == LEVELS
    assert decoded.fps == SPEC.fps


def test_frames_are_resized_while_they_are_decoded():
    data = clip(LEVELS)
    here = decode(data, resize_here=True)
    assert here.frames.shape == (6, 28, 56, 3)
    assert here.size == (48, 64)
    expected = [resize_bicubic(frame, 28, 56) for frame in decode(data).frames]
    np.testing.assert_array_equal(here.frames, expected)


def test_a_phone_video_is_turned_upright():
    """The camera stored the scene lying on its side, with a matrix that says to turn it clockwise."""
    scene = np.zeros((64, 48, 3), dtype=np.uint8)
    scene[:32, :24] = 255  # the upper left is white
    stored = np.ascontiguousarray(np.rot90(scene))
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for _ in range(4):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        output.mux(stream.encode())
    data = bytearray(file.getvalue())
    matrix = data.index(b"tkhd") + 44
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    decoded = decode(bytes(data))
    assert decoded.size == (64, 48)
    assert np.abs(decoded.frames[0].astype(int) - scene).mean() < 8


# -- broken and hostile


def refused(data: bytes, match: str, policy: MediaPolicy = POLICY, **options) -> None:
    with pytest.raises(BadMedia, match=match):
        decode(data, policy=policy, **options)


def test_broken_files():
    data = clip(LEVELS, container="mp4", codec="mpeg4", pixel_format="yuv420p")
    refused(b"", "0 bytes")
    refused(b"hello", "cannot be decoded")
    refused(bytes(10_000), "cannot be decoded")
    refused(data[: len(data) // 2], "cannot be decoded")
    refused(data[:40], "cannot be decoded|no video")


def test_a_container_without_pictures():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    refused(file.getvalue(), "no video in it")


def test_a_header_alone():
    data = clip(LEVELS)
    refused(data[: data.index(b"\x1f\x43\xb6\x75")], "no frames|cannot be decoded")  # up to the first Matroska cluster


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["mp4", "matroska"]), st.data())
def test_flipped_bytes_never_raise_anything_but_bad_media(container, data):
    codec, pixel_format = ("mpeg4", "yuv420p") if container == "mp4" else ("ffv1", "bgr0")
    file = bytearray(clip(LEVELS[:6], container=container, codec=codec, pixel_format=pixel_format))
    for _ in range(data.draw(st.integers(1, 12))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    small = dataclasses.replace(POLICY, max_frame_pixels=10**6, max_video_frames=1000)
    with contextlib.suppress(BadMedia):
        decode(bytes(file), policy=small)


def test_formats_that_are_not_on_the_list_are_not_tried():
    """The library can read these; each reader more, and above all each playlist, is a way in."""
    nut = clip(LEVELS, container="nut")
    with av.open(io.BytesIO(nut)) as container:
        assert container.streams.video
    refused(nut, "cannot be decoded")
    odd_codec = clip(LEVELS, container="avi", codec="huffyuv", pixel_format="rgb24")
    with av.open(io.BytesIO(odd_codec)) as container:
        assert next(container.decode(video=0))
    refused(odd_codec, "cannot be decoded")


def test_playlists_open_nothing(site, tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(clip(LEVELS, container="mp4", codec="mpeg4", pixel_format="yuv420p"))
    for target in (site.url("red.png"), str(secret), f"file:{secret}"):
        refused(
            f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n".encode(), "cannot be decoded"
        )
        refused(f"ffconcat version 1.0\nfile '{target}'\n".encode(), "cannot be decoded")
    assert site.seen == []


def test_caps(monkeypatch):
    data = clip(LEVELS)
    refused(data, "more than 3071 pixels", dataclasses.replace(POLICY, max_frame_pixels=64 * 48 - 1))
    assert decode(data, policy=dataclasses.replace(POLICY, max_frame_pixels=64 * 48)).size == (48, 64)
    monkeypatch.setattr(video, "_LIBRARY_LIMIT", "no such option")  # our own check stands beside the library's
    refused(data, "more than 3071 pixels", dataclasses.replace(POLICY, max_frame_pixels=64 * 48 - 1))
    refused(data, "more than 29 frames", dataclasses.replace(POLICY, max_video_frames=29))
    assert decode(data, policy=dataclasses.replace(POLICY, max_video_frames=30)).size == (48, 64)
    work = 30 * 48 * 64
    refused(data, "a shorter one", dataclasses.replace(POLICY, max_video_pixels=work - 1))
    assert decode(data, policy=dataclasses.replace(POLICY, max_video_pixels=work)).size == (48, 64)


def test_frames_too_large_to_keep_are_resized_even_if_the_device_could():
    data = clip(LEVELS)
    kept = 6 * 48 * 64 * 3
    assert decode(data, policy=dataclasses.replace(POLICY, max_video_bytes=kept)).frames.shape == (6, 48, 64, 3)
    assert decode(data, policy=dataclasses.replace(POLICY, max_video_bytes=kept - 1)).frames.shape == (6, 28, 56, 3)
    refused(data, "more than 9999 bytes", dataclasses.replace(POLICY, max_video_bytes=9999))


def test_a_stack_takes_frames_of_one_size():
    stack = FrameStack(2, POLICY, fit=fit, resize_here=True)
    stack.add(np.zeros((4, 6, 3), dtype=np.uint8))
    with pytest.raises(BadMedia, match="same size"):
        stack.add(np.zeros((6, 4, 3), dtype=np.uint8))
