"""Fonts for drawing: which Debian packages, which families are for scoring only, and loading them quickly.

`python -m tools.demo_model.fonts --source /usr/share/fonts --target .fonts` cuts every usable font down to the
characters that the demo model reads (a few kilobytes each) and sorts them into train/ and held_out/.
"""

import argparse
import functools
import io
import random
import re
from collections import defaultdict
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTCollection, TTFont
from PIL import ImageFont

from tools.demo_model.vocab import chinese_characters

TRAIN_PACKAGES = """
fonts-dejavu-core fonts-dejavu-extra fonts-liberation fonts-freefont-ttf fonts-lato fonts-roboto-unhinted
fonts-roboto-slab fonts-cantarell fonts-firacode fonts-jetbrains-mono fonts-crosextra-carlito fonts-linuxlibertine
fonts-ebgaramond fonts-comfortaa fonts-quicksand fonts-dosis fonts-cabin fonts-oldstandard fonts-urw-base35
fonts-sil-gentium-basic fonts-sil-andika fonts-vollkorn fonts-junction fonts-b612 fonts-go fonts-karla fonts-jura
fonts-play fonts-league-mono fonts-anonymous-pro fonts-mononoki fonts-monofur fonts-fantasque-sans
fonts-opendyslexic fonts-oxygen fonts-paratype fonts-adf-gillius fonts-adf-universalis fonts-adf-accanthis
fonts-adf-baskervald fonts-adf-libris fonts-adf-tribun fonts-adf-mekanus fonts-sora fonts-national-park fonts-tuffy
fonts-averia-sans-gwf fonts-averia-serif-gwf fonts-gfs-didot fonts-gfs-artemisia fonts-croscore fonts-hermit
fonts-prociono fonts-fanwood fonts-noto-mono fonts-yanone-kaffeesatz fonts-cardo fonts-thai-tlwg-ttf
fonts-lxgw-wenkai fonts-wqy-microhei fonts-arphic-gbsn00lp fonts-arphic-ukai fonts-noto-cjk
""".split()
HELD_OUT_PACKAGES = """
fonts-open-sans fonts-crosextra-caladea fonts-hack fonts-inter fonts-courier-prime fonts-inconsolata fonts-stix
fonts-sil-charis fonts-gfs-neohellenic fonts-adf-switzera fonts-wqy-zenhei fonts-arphic-uming
""".split()

HELD_OUT = re.compile(
    r"OpenSans|Caladea|Hack|Inter|Courier Prime|Inconsolata|STIX-|CharisSIL|GFSNeohellenic|SwitzeraADF|wqy-zenhei|uming"
)
# Hairlines, small capitals, outlines, swashes, symbols, duplicates and files of many near-identical widths.
SKIPPED = re.compile(
    r"thin|extralight|ultralight|hairline|outline|smallcap|titling|symbol|dingbat|math|d050000l|z003|keyboard|_k\b|"
    r"libinitials|\bbiolinum_k|linlibertine_i|_aS|display|texgyre|lm[a-z]+\d|wide|extended|narrowultra|[Cc]ondensedExtra|"
    r"\[wght\]|karlatamil|minus|alta|no3|adfstdno2|italic\.otf$.*fantasque|purisa|sawasdee|ubuntu-title|variants|"
    r"general|nonunicode|sizetwo|integrals|linlibertine_c|linlibertine_dr|firasanscomp|lohit|samyak|serifcjk-bold",
    re.IGNORECASE,
)
ASCII = "".join(chr(code) for code in range(32, 127))


def family(stem: str) -> str:
    """A coarse family name, so that a family with twenty weights is not drawn twenty times as often."""
    return re.sub(r"(-|_| (B|BI|I|Bold|Italic)$|Bold|Italic|Oblique|\d).*", "", stem)


def usable_characters(font: TTFont) -> str | None:
    """ASCII, or ASCII and Chinese, when the font has them all (up to three Chinese characters may be missing)."""
    known = set(font.getBestCmap() or {})
    if any(ord(character) not in known for character in ASCII):
        return None
    chinese = [character for character in chinese_characters() if ord(character) in known]
    return ASCII + "".join(chinese) if len(chinese) >= len(chinese_characters()) - 3 else ASCII


def open_font(path: Path) -> TTFont:
    """The font, or for a collection its simplified-Chinese (else first) member."""
    if path.suffix.lower() != ".ttc":
        return TTFont(path, lazy=True)
    members = TTCollection(path, lazy=True).fonts
    simplified = [font for font in members if "SC" in (font["name"].getDebugName(6) or "")]
    return (simplified or members)[0]


def cut(path: Path, target: Path) -> bool:
    """Write the font reduced to what we read; False when it lacks characters."""
    font = open_font(path)
    characters = usable_characters(font)
    if characters is None:
        return False
    options = subset.Options(layout_features=["kern"], hinting=False, notdef_outline=True, drop_tables=["GSUB", "DSIG"])
    cutter = subset.Subsetter(options)
    cutter.populate(text=characters)
    cutter.subset(font)
    part = "held_out" if HELD_OUT.search(path.stem) else "train"
    script = "chinese" if len(characters) > len(ASCII) else "latin"
    folder = target / part / script
    folder.mkdir(parents=True, exist_ok=True)
    font.save(folder / f"{path.stem.replace(' ', '')}{'.otf' if 'CFF ' in font else '.ttf'}")
    return True


class FontBook:
    """Fonts of one part ("train" or "held_out"), picked family first, opened once per size."""

    def __init__(self, folder: Path, part: str) -> None:
        self.latin = self._families(folder / part / "latin")
        self.chinese = self._families(folder / part / "chinese")
        if not self.latin:
            raise FileNotFoundError(f"no fonts under {folder / part}; see docs/demo-model.md")

    @staticmethod
    def _families(folder: Path) -> list[list[str]]:
        groups = defaultdict(list)
        for path in sorted(folder.glob("*.[to]tf")):
            groups[family(path.stem)].append(str(path))
        return list(groups.values())

    def pick(self, rng: random.Random, chinese: bool = False) -> str:
        return rng.choice(rng.choice(self.chinese if chinese else self.latin))


@functools.cache
def _data(path: str) -> bytes:
    return Path(path).read_bytes()


@functools.lru_cache(maxsize=3000)
def load(path: str, size: int) -> ImageFont.FreeTypeFont:
    """From memory: Pillow keeps one open file per font object otherwise."""
    return ImageFont.truetype(io.BytesIO(_data(path)), size, layout_engine=ImageFont.Layout.BASIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/fonts"))
    parser.add_argument("--target", type=Path, default=Path(".fonts"))
    arguments = parser.parse_args()
    paths = [path for path in sorted(arguments.source.rglob("*")) if path.suffix.lower() in (".ttf", ".otf", ".ttc")]
    chosen = {path.stem: path for path in paths if not SKIPPED.search(path.stem)}
    kept = sum(cut(path, arguments.target) for path in chosen.values())
    print(f"{kept} of {len(paths)} fonts in {arguments.target}")


if __name__ == "__main__":
    main()
