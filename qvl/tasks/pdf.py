"""Pages of a PDF as pictures, at the size that suits the model. Knows pdfium; does not know who asks what about them.

pdfium is not safe to use from several threads at once: everything here happens under one lock.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from qvl.errors import BadMedia, InvalidRequest
from qvl.types import PictureRule

if TYPE_CHECKING:
    import pypdfium2

POINTS_PER_INCH = 72
MOST_DPI = 200.0  # above it, print of usual size gains nothing
UNTOLD_PIXELS = 2_200_000  # of a page for a model that does not say how it sees: A4 at 150 dots per inch
MOST_PIXELS = 100_000_000  # of a page at a resolution asked for
CONTEXT_SHARE = 0.5  # of the model's context for one page; the rest is for the answer and the words around it

_PASSWORD = 4  # pdfium's FPDF_ERR_PASSWORD
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Resolution:
    """How large pages are drawn: `dpi` dots per inch where that is given, else at most `pixels` in all."""

    pixels: int = UNTOLD_PIXELS
    dpi: float | None = None

    @classmethod
    def for_model(cls, rule: PictureRule | None, context: int | None) -> Resolution:
        """As large as the model takes a picture, and leaves room for an answer."""
        if rule is None:
            return cls()
        most = rule.max_pixels
        if context is not None:
            most = min(most, int(context * CONTEXT_SHARE) * rule.factor**2)
        return cls(max(most, rule.factor**2))

    def scale(self, width: float, height: float) -> float:
        """Pixels per point for a page of `width` x `height` points. Raises `InvalidRequest` for a giant picture."""
        if self.dpi is None:
            return min(math.sqrt(self.pixels / (width * height)), MOST_DPI / POINTS_PER_INCH)
        scale = self.dpi / POINTS_PER_INCH
        if width * height * scale**2 > MOST_PIXELS:
            raise InvalidRequest(f"a page of {width:.0f} x {height:.0f} points is too large for {self.dpi:g} dpi")
        return scale


def is_pdf(head: bytes) -> bool:
    """By the first kilobyte of a file; some programs write a few bytes before the mark."""
    return b"%PDF-" in head[:1024]


def num_pages(source: Path | bytes) -> int:
    """Raises `BadMedia` for a PDF that is broken, locked or empty."""
    with _LOCK, _document(source) as document:
        count = len(document)
    if count == 0:
        raise BadMedia("the PDF has no pages")
    return count


def draw_page(source: Path | bytes, number: int, resolution: Resolution) -> Image.Image:
    """Page `number` (from 1) with its annotations and filled-in forms, RGB on white."""
    import pypdfium2

    with _LOCK, _document(source) as document:
        try:
            document.init_forms()
            page = document[number - 1]
            scale = resolution.scale(*page.get_size())
            drawn: Image.Image = page.render(scale=scale).to_pil()
            return drawn.convert("RGB")
        except (pypdfium2.PdfiumError, ZeroDivisionError) as error:
            raise BadMedia(f"page {number} cannot be drawn: it is broken") from error


@contextmanager
def _document(source: Path | bytes) -> Iterator[pypdfium2.PdfDocument]:
    import pypdfium2  # only who reads PDFs pays for it

    try:
        document = pypdfium2.PdfDocument(source)
    except pypdfium2.PdfiumError as error:
        if error.err_code == _PASSWORD:
            raise BadMedia("the PDF is locked with a password: unlock it first (qpdf --decrypt)") from None
        raise BadMedia("the PDF is broken: it cannot be opened") from None
    except OSError as error:
        raise BadMedia(f"the PDF cannot be read: {error.strerror}") from None
    try:
        yield document
    finally:
        document.close()
