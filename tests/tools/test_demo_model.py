"""The demo checkpoint's tools: tokenizer, drawing, packing and the dense model against transformers."""

import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tools.demo_model import augment, checkpoint, films, pack, shapes, tasks, vocab, words  # noqa: E402
from tools.demo_model.draw import Line, blank  # noqa: E402
from tools.demo_model.fonts import FontBook, load  # noqa: E402
from tools.demo_model.model import DemoModel, Shape  # noqa: E402
from tools.demo_model.tasks import Picture, Sample, Turn  # noqa: E402

TINY = Shape(
    hidden_size=64, intermediate_size=96, layers=2, heads=2, kv_heads=1, mrope_section=(4, 6, 6),
    vision_size=64, vision_depth=2, vision_heads=2,
)  # fmt: skip
TEXTS = ["Hello, world! It's 12:30\n\n x", "读出图中的文字。", "émile 😀 龘 \t|\\", ""]


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A font folder made of a font that comes with Pillow, under both parts."""
    from PIL import ImageFont

    data = ImageFont.load_default(24)
    source = data.font_bytes
    folder = tmp_path_factory.mktemp("fonts")
    for part in ("train", "held_out"):
        for script in ("latin", "chinese"):
            (folder / part / script).mkdir(parents=True)
            (folder / part / script / "Default-Regular.ttf").write_bytes(source)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny checkpoint in float32."""
    torch.manual_seed(0)
    model = DemoModel(TINY)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint.save_checkpoint(model, folder, torch.float32)
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_the_saved_tokenizer_agrees_with_ours(text: str) -> None:
    import tokenizers

    saved = tokenizers.Tokenizer.from_str(json.dumps(vocab.tokenizer_json()))
    ids = saved.encode(text).ids
    assert ids == vocab.encode(text)
    assert saved.decode(ids) == vocab.decode(ids) == text


def test_a_readable_character_is_one_token() -> None:
    assert all(len(vocab.encode(character)) == 1 for character in vocab.READABLE)
    assert len(vocab.chinese_characters()) >= 500
    assert max(vocab.token_ids().values()) < vocab.VOCAB_SIZE


def test_points_stand_on_the_ink_of_their_character(fonts: Path) -> None:
    page = blank(random.Random(1), 300, 60, plain=True)
    font = load(FontBook(fonts, "train").latin[0][0], 30)
    line = page.text(10, 40, "HM H", font)
    assert [page.points[ref][2] if ref >= 0 else 0 for ref in line.refs] == [
        vocab.CLASS_OF["H"], vocab.CLASS_OF["M"], 0, vocab.CLASS_OF["H"],
    ]  # fmt: skip
    dark = np.asarray(page.image.convert("L")) < 128
    columns = np.flatnonzero(dark.any(0))
    x = [page.points[ref][0] for ref in line.refs if ref >= 0]
    assert columns.min() < x[0] < x[1] < x[2] < columns.max()
    assert dark[:, round(x[0])].any()  # the bar of the H


def test_the_same_seed_draws_the_same_batch(fonts: Path) -> None:
    book = FontBook(fonts, "train")
    (one, pages), (two, again), (other, _) = (pack.make_batch(3, index, book, 0.05, 600) for index in (7, 7, 8))
    assert one["recipe"] == two["recipe"] and np.array_equal(one["ids"], two["ids"])
    assert pages[0].frames[0][0].image.tobytes() == again[0].frames[0][0].image.tobytes()
    assert not np.array_equal(one["ids"], other["ids"])


def test_every_task_packs(fonts: Path) -> None:
    studio = tasks.Studio(random.Random(5), FontBook(fonts, "train"))
    for maker in (tasks.plain_reading, tasks.one_line, tasks.follow_up, tasks.shape_box, tasks.word_box, tasks.table):
        sample = maker(studio, (9, 14))
        row = pack.write(sample, ((9, 14),))
        answers = [token for token in row.labels if token >= 0]
        assert answers.count(vocab.SPECIAL["<|im_end|>"]) == len(sample.turns) and len(row.vision) == 9 * 14


def test_a_film_keeps_words_on_screen_for_long_and_asks_for_each_once(fonts: Path) -> None:
    rng, longest = random.Random(3), 0
    studio = tasks.Studio(rng, FontBook(fonts, "train"))
    for grids in ([(9, 16)] * 8, [(8, 16)] * 3):
        for _ in range(6):
            film = films.video(studio, grids)
            said = vocab.decode([token for token, _ in film.turns[0].answer]).split(" ")
            pages = [id(page) for pages in film.frames for page in pages]
            assert len(film.frames) == len(grids) and len(said) == len(set(pages))
            assert all(one != next_one for one, next_one in itertools.pairwise(said))
            longest = max(longest, max(pages.count(page) for page in pages))
    assert longest >= 4  # steps of two frames: at least eight frames


def test_similar_words_differ_and_share_a_part() -> None:
    rng = random.Random(1)
    for text in ("ready", "ab", "x", "2024") * 20:
        other = words.similar(rng, text)
        assert other and len(text) - 3 <= len(other) <= len(text) + 2
        assert len(text) == 1 or other[0] == text[0] or other[-1] == text[-1]


def test_the_list_of_shapes_points_at_their_centres(fonts: Path) -> None:
    rng = random.Random(2)
    page, drawn = shapes.shapes_page(rng, 300, 280, 4)
    answer = tasks.list_shapes(drawn)
    names = [shape.name for shape in sorted(drawn, key=lambda shape: shape.box[0])]
    text = vocab.decode([token for token, _ in answer]).rstrip(".").lower()
    assert [part.split(" ", 1)[1] for part in text.replace(" and ", ", ").split(", ")] == names
    seen = list(dict.fromkeys(ref for _, (slot, ref) in answer if slot == 0))
    assert [page.points[ref][2] for ref in seen] == [shapes.CLASS_OF[name] for name in names]
    assert [page.points[ref][:2] for ref in seen] == [shape.center for shape in sorted(drawn, key=lambda s: s.box[0])]


def test_positions_are_those_of_qwen2_vl() -> None:
    film = Sample([], [Turn([Picture([0, 1, 2], True)], tasks.say("ab"))], system=None)
    row = pack.write(film, ((2, 2),) * 3)
    start = row.vision[0]
    assert row.positions[start : start + 5] == [(7, 7, 7), (7, 7, 8), (7, 8, 7), (7, 8, 8), (8, 7, 7)]
    assert row.positions[row.vision[-1] + 1] == (10, 10, 10)


def test_characters_are_named_left_to_right() -> None:
    token = torch.tensor([[2, 0, 0, 1, -1]])
    x = torch.tensor([[60.0, 20.0, 5.0, 30.0, 90.0]])
    kind = torch.tensor([[4, 2, 1, 0, 9]])
    assert augment.character_targets(token, x, kind, 4).tolist() == [
        [[1, 2, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0]]
    ]


def test_points_move_with_the_pixels() -> None:
    pixels = torch.zeros(1, 3, 56, 84)
    pixels[..., 20:24, 60:64] = 255.0
    warp = augment.Warp(torch.tensor([[[0.98, -0.17], [0.17, 0.98]]]), torch.tensor([[3.0, -5.0]]))
    out = augment.warp_pixels(pixels, warp)[0, 0]
    rows, columns = torch.meshgrid(torch.arange(56) + 0.5, torch.arange(84) + 0.5, indexing="ij")
    seen = torch.stack(((columns * out).sum() / out.sum(), (rows * out).sum() / out.sum()))
    moved = augment.warp_points(torch.tensor([[[62.0, 22.0]]]), warp, 84, 56)[0, 0]
    assert torch.allclose(seen, moved, atol=0.6)


def _conversations() -> list[tuple[str, Sample, tuple[tuple[int, int], ...]]]:
    def nothing(text: str) -> Turn:
        return Turn([text], tasks.say("yes"))

    return [
        ("text", Sample([], [nothing("Hi")]), ()),
        ("picture", Sample([], [Turn([Picture([0]), "Read."], tasks.say("a")), nothing("and?")]), ((3, 4),)),
        ("pictures", Sample([], [Turn([Picture([0]), "or", Picture([1])], tasks.say("b"))]), ((2, 3), (4, 2))),
        ("video", Sample([], [Turn([Picture([0, 1, 2], True), "Words?"], tasks.say("c"))]), ((2, 2),) * 3),
    ]


@pytest.mark.parametrize("name, sample, grids", _conversations())
def test_the_dense_model_is_transformers_model(
    name: str, sample: Sample, grids: tuple[tuple[int, int], ...], tiny: Path
) -> None:
    import transformers

    reference = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()
    model = checkpoint.load_checkpoint(tiny)
    row, video = pack.write(sample, grids), name == "video"
    ids, positions = torch.tensor([row.ids]), torch.tensor(row.positions).T[:, None]
    frames = [torch.rand(1, 2, 3, rows * 28, columns * 28) * 255 for rows, columns in grids]
    frames = frames if video else [frame[:, :1].expand(-1, 2, -1, -1, -1) for frame in frames]
    patches = [augment.patchify(frame if video else frame[:, :1], torch.float32) for frame in frames]
    inputs = _reference_inputs(frames, grids, video)
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits
        features = model.see([(p[:, None], *grid) for p, grid in zip(patches, grids, strict=True)]) if grids else None
        x = model.embed(ids, features, torch.tensor([row.vision]))
        found = model.logits(model.decode(x, positions)[0])
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def _reference_inputs(frames: list, grids: tuple[tuple[int, int], ...], video: bool) -> dict:
    """Patches as the Qwen2-VL processor lays them out: channel, temporal, height, width."""
    if not grids:
        return {}
    rows = []
    for frame in frames:
        flat = augment.patchify(frame, torch.float32)[0]
        rows.append(flat.view(-1, 2, 3, 14, 14).transpose(1, 2).reshape(-1, 1176))
    kind = "video" if video else "image"
    steps = [(len(grids), grids[0][0] * 2, grids[0][1] * 2)] if video else [(1, r * 2, c * 2) for r, c in grids]
    pixels = "pixel_values_videos" if video else "pixel_values"
    return {pixels: torch.cat(rows), f"{kind}_grid_thw": torch.tensor(steps)}


def test_markdown_of_a_table() -> None:
    cells = [[Line(text, [-1] * len(text), (0, 0, 0, 0)) for text in row] for row in (["a", "b"], ["1", "2"])]
    text = vocab.decode([token for token, _ in tasks.markdown(cells)])
    assert text == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_scorer_sees_what_transformers_sees() -> None:
    import transformers
    from PIL import Image

    from tools.demo_model.score import patches

    processor = transformers.Qwen2VLImageProcessor(min_pixels=checkpoint.MIN_PIXELS, max_pixels=checkpoint.MAX_PIXELS)
    for size in ((123, 77), (420, 300), (900, 500)):
        noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        expected = processor(images=[image], return_tensors="pt")
        pixels, grid = patches([image], checkpoint.MIN_PIXELS, checkpoint.MAX_PIXELS)
        assert [list(grid)] == expected["image_grid_thw"].tolist()
        assert float((pixels - expected["pixel_values"]).abs().max()) < 1e-4


def test_a_film_asks_for_the_words_that_it_shows(fonts: Path) -> None:
    from tools.demo_model.held_out import film

    rng, book, lengths = random.Random(1), FontBook(fonts, "held_out"), set()
    for _ in range(60):
        frames, shown = film(rng, book)
        assert len({id(frame) for frame in frames}) == len(shown)
        lengths.add((len(frames), len(shown)))
    assert {(10, 3), (10, 4)} <= lengths  # both with and without a word that was cut off


def test_a_word_clip_shows_every_word_in_its_sampled_frames(fonts: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not on the machine that trains")
    if "libx264" not in av.codecs_available:
        pytest.skip("this PyAV does not encode H.264")
    from tools.demo_model.clips import word_clip

    rng, book = random.Random(4), FontBook(fonts, "held_out")
    for _ in range(3):
        frames, shown = word_clip(rng, book)
        pictures = [np.asarray(frame.convert("L"), np.float32) for frame in frames]
        cuts = sum(np.abs(one - other).max() > 64 for one, other in itertools.pairwise(pictures))
        assert len(frames) % 2 == 0 and cuts == len(shown) - 1


def test_the_bundled_checkpoint_keeps_its_promises() -> None:
    folder = ROOT / "qvl" / "demo"
    config = json.loads((folder / "config.json").read_text())
    assert checkpoint.hf_config(checkpoint.shape_of(folder), vocab.SPECIAL) == config
    assert sum(parameter.numel() for parameter in checkpoint.load_checkpoint(folder).parameters()) <= 12_000_000
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 24_000_000
    assert json.loads((folder / "tokenizer.json").read_text()) == vocab.tokenizer_json()
