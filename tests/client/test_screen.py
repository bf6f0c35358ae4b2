"""The screen as a picture. A screen is put in place of one where the machine has none."""

from __future__ import annotations

import pytest
from PIL import Image, ImageGrab

import qvl
from qvl.client.screen import screen_part, screenshot
from qvl.errors import InvalidRequest

SCREEN = Image.new("RGBA", (800, 600), "white")
SCREEN.paste((255, 0, 0, 255), (100, 50, 300, 150))


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageGrab, "grab", lambda: SCREEN.copy())


def test_all_of_it_and_a_region(screen: None) -> None:
    whole = screenshot()
    assert (whole.size, whole.mode) == ((800, 600), "RGB")
    assert screenshot((100, 50, 300, 150)).getcolors() == [(200 * 100, (255, 0, 0))]
    assert qvl.screenshot is screenshot


@pytest.mark.parametrize("box", [(0, 0, 0, 10), (10, 0, 5, 10), (0, 0, 801, 10), (-1, 0, 5, 5)])
def test_what_is_no_region_of_it(screen: None, box: tuple[int, int, int, int]) -> None:
    with pytest.raises(InvalidRequest, match=r"no region .* of a screen of 800 x 600 pixels"):
        screenshot(box)


def test_by_name(screen: None) -> None:
    part = screen_part("screen:100,50,300,150")
    assert part is not None and part.kind == "image" and part.source.size == (200, 100)
    whole = screen_part("screen:")
    assert whole is not None and whole.source.size == (800, 600)
    assert screen_part("screen.png") is None
    with pytest.raises(InvalidRequest, match="names no region"):
        screen_part("screen:1,2,3")


def test_no_screen_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def grab() -> Image.Image:
        raise OSError("X connection failed: error 5")

    monkeypatch.setattr(ImageGrab, "grab", grab)
    with pytest.raises(InvalidRequest, match="no screen can be seen from here: X connection failed"):
        screenshot()
