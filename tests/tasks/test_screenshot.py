"""A screenshot becomes one file that opens, and its likeness can be looked at."""

from __future__ import annotations

import pytest
from PIL import Image

from qvl.errors import BadAnswer
from qvl.tasks import screenshot
from qvl.tasks.page import Page
from qvl.tasks.run import asking
from qvl.tasks.screenshot import Webpage, side_by_side, webpage
from qvl.types import MediaPart
from tests.tasks.scripted import Scripted

HTML = "<!DOCTYPE html>\n<html><body><img src=logo.png><p>Hello</p></body></html>"
SHOT = Image.new("RGB", (640, 480), "white")


@pytest.mark.parametrize(
    "answer",
    [
        HTML,
        f"```html\n{HTML}\n```",
        f"Sure:\n\n```html\n{HTML}\n```\nDone.",
        f"Sure:\n```html\n{HTML}",
        f"Here is the page, with a <style> element:\n\n{HTML}\n\nIt uses <p>.",
        f"First this:\n```\nmkdir page\n```\nthen\n```html\n{HTML}\n```",
        f"以下是HTML代码：\n```html\n{HTML}\n```\n请注意，图片需要替换。",
    ],
)
def test_a_page_is_found_in_the_answer(answer: str) -> None:
    model = Scripted([answer])
    with pytest.warns(UserWarning, match=r"logo\.png"):
        page = webpage(SHOT, model=model)
    assert page.html.startswith("<!DOCTYPE html>") and page.html.rstrip().endswith("</html>")
    assert "<p>Hello</p>" in page.html and "```" not in page.html and page.removed == ("logo.png",)
    assert model.prompts()[0].endswith("The screenshot is 640 x 480 pixels.")


@pytest.mark.parametrize("order", ["{page}\n{sheet}", "{sheet}\n{page}"])
@pytest.mark.parametrize(
    "html", ["<html><head><link rel=stylesheet href=a.css></head><body>x</body></html>", "<p>x</p>"]
)
def test_a_style_sheet_in_a_fence_of_its_own_belongs_to_the_page(order: str, html: str) -> None:
    sheet = "```css\n/* styles.css */\n.a > p { color: red; }\n```"
    answer = order.format(page=f"```html\n{html}\n```", sheet=sheet)
    page = Webpage().read(f"Here are two files:\n{answer}")
    assert page.html.count("<style>") == 1 and ".a > p { color: red; }" in page.html and "x" in page.html
    assert "```" not in page.html and "Here are" not in page.html


def test_a_cut_answer_becomes_a_whole_page_with_a_remark() -> None:
    model = Scripted(["```html\n<html><body><div><p>Hel"], finish_reason="length")
    result = Webpage().answer(asking(model), (MediaPart("image", SHOT),))
    assert result.text.rstrip().endswith("<p>Hel</div></body></html>")
    assert "--max-tokens" in result.notes[0] and "closed: div, body, html" in result.notes[1]
    assert result.data == {"html": result.text, "removed": [], "closed": ["div", "body", "html"]}


@pytest.mark.parametrize("answer", ["Meeting at 10:30", "", "```html\n```"])
def test_an_answer_without_a_page_is_shown(answer: str) -> None:
    with pytest.raises(BadAnswer, match="no HTML"):
        webpage(SHOT, model=Scripted([answer]))


def test_both_stand_side_by_side_at_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def shown(page: Page, width: int, height: int) -> Image.Image:
        asked.append((page, width, height))
        return Image.new("RGB", (width, height), "blue")

    monkeypatch.setattr(screenshot, "render", shown)
    page = Page("<p>")
    beside = side_by_side(Image.new("RGB", (300, 200), "red"), page)
    assert asked == [(page, 300, 200)]
    counts = {color: count for count, color in beside.getcolors(beside.width * beside.height) or []}
    assert counts[(255, 0, 0)] == counts[(0, 0, 255)] == 300 * 200
