"""PDFs for tests, written here: pages of print, a locked one, a page of any size."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def printed(text: str, width: int = 420, height: int = 200) -> Image.Image:
    """Black print on white that the bundled checkpoint reads."""
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).multiline_text((24, 24), text, "black", ImageFont.load_default(36), spacing=16)
    return picture


def pdf_of(pictures: Sequence[Image.Image]) -> bytes:
    """A page for each picture, of as many points as it has pixels."""
    buffer = io.BytesIO()
    pictures[0].save(buffer, "PDF", save_all=True, append_images=pictures[1:], resolution=72)
    return buffer.getvalue()


def written(objects: Sequence[str], trailer: str) -> bytes:
    """A PDF of numbered objects, with the table of their offsets that belongs to it."""
    out = b"%PDF-1.4\n"
    offsets: list[int] = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    start = len(out)
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}".encode()
    return out + f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{start}\n%%EOF\n".encode()


def blank_page(width: float, height: float) -> bytes:
    page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] >>"
    return written(["<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [3 0 R] /Count 1 >>", page], "")


def locked() -> bytes:
    """Encrypted with a password that nobody knows."""
    secret = "<" + "5A" * 32 + ">"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] >>",
        f"<< /Filter /Standard /V 1 /R 2 /O {secret} /U {secret} /P -4 >>",
    ]
    return written(objects, f"/Encrypt 4 0 R /ID [<{'00' * 16}> <{'00' * 16}>]")


def no_pages() -> bytes:
    return written(["<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [] /Count 0 >>"], "")
