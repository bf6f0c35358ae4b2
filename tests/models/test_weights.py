"""Loading: every spelling gives the same network, and every defect is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvl.errors import CheckpointError, ConfigError
from qvl.layers.linear import Linear
from qvl.models import qwen2_vl, safetensors_file
from qvl.models.registry import build_model, model_class
from qvl.models.weights import load_weights
from qvl.specs import load_spec
from tests.checkpoints import write_checkpoint
from tests.engine.harness import Ask, greedy, make_engine, pixels, run, words

Tensors = dict[str, torch.Tensor]


def network(folder: Path, dtype: torch.dtype, load_format: Any = "auto") -> Any:
    model = build_model(load_spec(folder), dtype, "cpu")
    load_weights(model, folder, load_format=load_format)
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32, load_format: Any = "auto") -> Tensors:
    return dict(network(folder, dtype, load_format).named_parameters())


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def editable(tmp_path: Path, checkpoint: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def respell(folder: Path, spell: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({spell(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_merged_matrices_hold_their_parts_in_order(checkpoint: Path) -> None:
    theirs = load_file(checkpoint / "model.safetensors")
    ours = load(checkpoint)
    layer = "model.layers.1."
    parts = [theirs[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(ours[f"{layer}self_attn.qkv_proj.weight"], torch.cat(parts))
    parts = [theirs[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(ours[f"{layer}mlp.gate_up_proj.weight"], torch.cat(parts))


def test_the_newer_spelling_is_the_same_network(editable: Path, checkpoint: Path) -> None:
    def newer(name: str) -> str:
        if name.startswith("visual."):
            return f"model.{name}"
        return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name

    respell(editable, newer)
    assert "model.language_model.norm.weight" in load_file(editable / "model.safetensors")
    assert same(load(editable), load(checkpoint))


def test_shards_are_the_same_network(tmp_path: Path, checkpoint: Path) -> None:
    sharded = write_checkpoint(tmp_path / "model", seed=len("plain"), num_shards=3)
    assert len(list(sharded.glob("*.safetensors"))) == 3
    assert same(load(sharded), load(checkpoint))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded = write_checkpoint(tmp_path / "model", num_shards=3)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 .* model-00002-of-00003.safetensors"):
        load(sharded)


def test_an_index_that_promises_too_much_is_named(tmp_path: Path) -> None:
    sharded = write_checkpoint(tmp_path / "model", num_shards=2)
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors .* model.ghost"):
        load(sharded)
    index["weight_map"]["model.ghost"] = "../model.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load(sharded)


@pytest.mark.parametrize("saved", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
def test_every_precision_loads_as_every_other(tmp_path: Path, saved: str, target: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path / "model", dtype=saved)
    theirs = load_file(folder / "model.safetensors")
    model = network(folder, target)
    for name in ("model.embed_tokens", "visual.blocks.0.attn.qkv", "model.layers.0.mlp.down_proj"):
        layer = model.get_submodule(name)
        assert max(layer.parameters(), key=torch.numel).dtype == target
        assert torch.equal(everything(layer).to(target), theirs[f"{name}.weight"].to(target))


def everything(layer: Any) -> torch.Tensor:
    return layer.rows(torch.arange(sum(layer.parts)))


@pytest.mark.parametrize("variant", ["plain", "tied", "deep"])
def test_pairs_hold_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """All but an embedding that is nobody's head. Parts come in pieces of whole rows, from any row on."""
    folder = write_checkpoint(tmp_path / "model", variant=variant)
    monkeypatch.setattr(safetensors_file, "PIECE", 4096 + 8)
    monkeypatch.setattr(qwen2_vl, "form_of_numbers", lambda *_: None)
    as_saved = network(folder, torch.bfloat16)
    monkeypatch.setattr(qwen2_vl, "form_of_numbers", lambda *_: "pairs")
    model = network(folder, torch.bfloat16)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    assert len(layers) > 15
    for name, layer in layers.items():
        assert torch.equal(everything(layer), everything(as_saved.get_submodule(name)).float()), name
    alone = [name for name, layer in layers.items() if layer.matrix is None]
    assert alone == ([] if variant == "tied" else ["model.embed_tokens"])


def test_a_tied_checkpoint_may_carry_its_head(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", variant="tied")
    expected = load(folder)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same(load(folder), expected)
    edit(folder, lambda t: t["lm_head.weight"][-1].add_(1))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings.*'lm_head.weight' differs"):
        load(folder)


def test_buffers_of_old_files_are_passed_over(editable: Path, checkpoint: Path) -> None:
    edit(editable, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert same(load(editable), load(checkpoint))


def _misshape(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.ones(63)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"), "1 tensors are missing: .*1.self_attn.k_proj.bias"),
        (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "not part of this model: model.extra.weight"),
        (_misshape, r"wrong shape: model.norm.weight \[63\] instead of \[64\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).char()}), "not supported: .*norm.weight I8"),
        (lambda t: t.update({"model.language_model.norm.weight": torch.ones(64)}), "twice: .*model.norm.weight"),
        (lambda t: t.update({"model.layers.0.qweight": torch.ones(2)}), "quantised .*qweight.*unquant"),
    ],
    ids=["missing-part", "missing-head", "unexpected", "shape", "number-type", "twice", "quantised"],
)  # fmt: skip
def test_what_does_not_fit_is_named(editable: Path, change: Callable[[Tensors], object], says: str) -> None:
    edit(editable, change)
    with pytest.raises(CheckpointError, match=says):
        load(editable)


def test_long_lists_are_cut(editable: Path) -> None:
    edit(editable, lambda t: t.update({f"x{i}": torch.ones(1) for i in range(30)}))
    with pytest.raises(CheckpointError, match=r"30 tensors are .* x\d+ and 22 more"):
        load(editable)


@pytest.mark.parametrize("keep", [0, 5, 1000, 50_000, -1])
def test_a_truncated_file_is_an_error(editable: Path, keep: int) -> None:
    path = editable / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        load(editable)


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\x10" + bytes(7) + b"[1, 2, 3, 4,   ]"]
)
def test_other_files_are_no_weights(editable: Path, content: bytes) -> None:
    (editable / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"git-lfs|damaged"):
        load(editable)


def test_files_that_are_not_there_or_empty_say_what_to_do(editable: Path) -> None:
    """As a download that was broken off leaves them."""
    path, shard = editable / "model.safetensors", editable / "model-00001-of-00002.safetensors"
    path.unlink()
    shard.symlink_to("../blobs/1234")
    with pytest.raises(CheckpointError, match=rf"^{shard.name} is a link to a file that is not there"):
        load(editable)
    shard.unlink()
    shard.touch()
    with pytest.raises(CheckpointError, match=rf"^{shard.name} is empty; download it again"):
        load(editable)
    (editable / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(CheckpointError, match=r"index.json is damaged: it names no file for each weight"):
        load(editable)


def test_a_shape_that_lies_about_its_size_is_damage(editable: Path) -> None:
    path = editable / "model.safetensors"
    content = path.read_bytes()
    assert b'"shape":[64]' in content
    path.write_bytes(content.replace(b'"shape":[64]', b'"shape":[65]', 1))
    with pytest.raises(CheckpointError, match="does not fit its shape"):
        load(editable)


def test_a_folder_without_safetensors_says_what_to_do(editable: Path) -> None:
    (editable / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        load(editable)
    (editable / "model.gguf").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="GGUF"):
        load(editable)
    (editable / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickle"):
        load(editable)


def test_tensors_longer_than_a_piece(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    whole = load(checkpoint)
    monkeypatch.setattr(safetensors_file, "PIECE", 4096 + 8)
    assert same(load(checkpoint), whole)


def test_dummy_weights_need_no_file_and_repeat(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", no_weights=True)
    first, second = load(folder, load_format="dummy"), load(folder, load_format="dummy")
    assert same(first, second)
    matrix = first["model.layers.0.mlp.gate_up_proj.weight"]
    assert len(matrix.unique(dim=0)) == len(matrix)


def test_dummy_weights_are_drawn_as_others_draw_them(tmp_path: Path) -> None:
    """vLLM and SGLang: uniform within 0.001, biases and norms too. A comparison under "dummy weights" means that."""
    drawn = load(write_checkpoint(tmp_path / "model", no_weights=True), load_format="dummy")
    assert {"model.norm.weight", "visual.blocks.0.norm1.bias", "visual.merger.mlp.0.bias"} <= drawn.keys()
    for name, numbers in drawn.items():
        assert 0.0005 < numbers.abs().max() <= 0.001, name
        assert len(numbers.unique()) > 0.9 * min(numbers.numel(), 10_000), name
    tenths = torch.histc(drawn["model.embed_tokens.weight"], 10, -0.001, 0.001)
    assert (tenths / tenths.sum()).tolist() == pytest.approx([0.1] * 10, abs=0.01)


@pytest.mark.parametrize("kind", [("float32", "none"), ("float16", "none"), ("bfloat16", "int4")])
def test_dummy_weights_give_an_answer_to_every_prompt(tmp_path: Path, kind: tuple[str, str]) -> None:
    """Numbers so small vanish in places, and norms that are not near one shrink what passes: nothing may overflow."""
    dtype, quantization = kind
    folder = write_checkpoint(tmp_path / "model", variant="tied", no_weights=True)
    engine = make_engine(folder, load_format="dummy", dtype=dtype, quantization=quantization)
    asks = [Ask([words(i, 7), pixels(i, 2, 3), words(i, 2)], greedy(4)) for i in range(6)]
    outcomes = run(engine, asks)
    assert [outcome.finish_reason for outcome in outcomes] == ["length"] * 6, outcomes[0].error
    assert len({outcome.token_ids[0] for outcome in outcomes}) == 6


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'LlamaForCausalLM' is not supported; supported: Qwen2VL"):
        model_class("LlamaForCausalLM")


def quantised(folder: Path, quantization: str, load_format: Any = "auto") -> Any:
    model = build_model(load_spec(folder), torch.bfloat16, "cpu", quantization)
    load_weights(model, folder, load_format=load_format)
    return model


@pytest.mark.parametrize(("quantization", "bits", "loss"), [("int8", 8, 0.012), ("int4", 4, 0.13)])
def test_rounded_matrices_hold_their_parts_in_order(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, quantization: str, bits: int, loss: float
) -> None:
    monkeypatch.setattr(safetensors_file, "PIECE", 4096 + 8)  # parts come in pieces of whole rows
    model, theirs = quantised(checkpoint, quantization), load_file(checkpoint / "model.safetensors")
    layer = "model.layers.1."
    parts = {
        f"{layer}self_attn.qkv_proj": [f"{layer}self_attn.{x}_proj" for x in "qkv"],
        f"{layer}mlp.gate_up_proj": [f"{layer}mlp.{x}_proj" for x in ("gate", "up")],
        f"{layer}mlp.down_proj": [f"{layer}mlp.down_proj"],
    }
    for name, names in parts.items():
        exact = torch.cat([theirs[f"{part}.weight"] for part in names])
        matrix = model.get_submodule(name).matrix
        assert matrix.bits == bits
        assert (matrix.read(torch.arange(matrix.rows)) - exact).norm() < loss * exact.norm()
    assert (model.lm_head.matrix.bits, model.visual.blocks[0].attn.qkv.matrix.bits) == (8, 8)
    assert model.form_of("visual.patch_embed.proj") == model.form_of_numbers
    assert model.model.embed_tokens.matrix is None


def test_a_tied_head_and_its_embedding_share_their_codes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", variant="tied")
    model, exact = quantised(folder, "int4"), load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    ids = torch.tensor([3, 600, 3])
    assert (model.embed(ids) - exact[ids]).norm() < 0.012 * exact[ids].norm()
    assert model.model.embed_tokens.weight is None
    assert model.logits(torch.eye(96)[:2]).shape == (2, 640)


def test_dummy_weights_are_those_of_the_unquantised_network(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", no_weights=True)
    exact = load(folder, load_format="dummy")["model.layers.0.mlp.gate_up_proj.weight"]
    matrix = quantised(folder, "int8", "dummy").model.layers[0].mlp.gate_up_proj.matrix
    assert (matrix.read(torch.arange(matrix.rows)) - exact).norm() < 0.012 * exact.norm()


def test_dummy_weights_in_pairs_are_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "model", no_weights=True)
    exact = load(folder, load_format="dummy")
    monkeypatch.setattr(qwen2_vl, "form_of_numbers", lambda *_: "pairs")
    model = network(folder, torch.bfloat16, "dummy")
    name = "model.layers.0.mlp.gate_up_proj"
    assert torch.equal(everything(model.get_submodule(name)), exact[f"{name}.weight"].bfloat16().float())
    assert torch.equal(model.model.norm.weight, exact["model.norm.weight"])


_MEASURE = """
import re, sys, torch
from qvl.models.registry import build_model
from qvl.models.weights import load_weights
from qvl.specs import load_spec
torch.set_num_threads(1)
torch.randn(64, 64) @ torch.randn(64, 64)
model = build_model(load_spec(sys.argv[1]), torch.bfloat16, "cpu", sys.argv[2])
def resident(which):  # bytes; unlike ru_maxrss the peak starts anew with the program
    return int(re.search(which + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = resident("VmRSS")  # the network has tried its products out, which took more for a moment
load_weights(model, sys.argv[1])
print(resident("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of more than 200 MB."""
    wide = {"hidden_size": 512, "intermediate_size": 16384, "num_attention_heads": 16, "num_key_value_heads": 2}
    text = {**wide, "vocab_size": 40_000, "num_hidden_layers": 3, "mrope_section": [4, 6, 6]}
    folder = write_checkpoint(tmp_path_factory.mktemp("large"), dtype="bfloat16", text=text)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_the_host_holds_the_weights_once(large: Path, quantization: str) -> None:
    weights = (large / "model.safetensors").stat().st_size
    assert weights > 200e6
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(large), quantization], capture_output=True, text=True, check=True
    )
    peak, held = map(int, run.stdout.split())
    piece = 0 if quantization == "none" else 64e6  # 16 MB of the file, as fp32, and copied once
    assert held < weights * {"none": 1.01, "int8": 0.6, "int4": 0.55}[quantization]
    assert 0.9 * held < peak < 1.2 * held + piece
