"""`qvl check`: what it says is what the engine would do, and a broken folder is told by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qvl.cli.app import run


def rows(out: str) -> dict[str, str]:
    return {name: told for name, told in (line.split(maxsplit=1) for line in out.splitlines())}  # noqa: C416  mypy


def test_a_good_folder(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(checkpoint), "--device", "cpu", "--kv-cache-memory", "1MiB", "--dtype", "float32"]) == 0
    told = rows(capsys.readouterr().out)
    tensors = load_file(checkpoint / "model.safetensors")
    assert told["weights"].startswith(f"complete: {len(tensors)} tensors in 1 file(s)")
    parameters = sum(t.numel() for t in tensors.values()) / 1e6
    assert f"{parameters:,.1f} M parameters" in told["checkpoint"]
    assert told["dtype"] == "float32: as asked for"
    # 2 layers x 2 heads x 16 numbers x (key, value) x 4 bytes = 512 bytes a token
    assert "2,048 tokens" in told["kv"]


def test_it_agrees_with_the_engine(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qvl.engine.config import resolve
    from qvl.engine.device import read_facts
    from qvl.engine.engine import Engine
    from qvl.engine.options import EngineOptions

    assert (
        run(["check", str(checkpoint), "--device", "cpu", "--max-model-len", "256", "--kv-cache-memory", "1MiB"]) == 0
    )
    told = rows(capsys.readouterr().out)
    options = EngineOptions(
        model=str(checkpoint), device="cpu", max_model_len=256, kv_cache_memory=1 << 20, num_threads=1
    )
    info = Engine(resolve(options, read_facts("cpu"))).info
    assert told["dtype"].startswith(f"{info.dtype}: ") and "faster" in told["dtype"]
    assert f"{info.kv_tokens:,} tokens" in told["kv"]
    assert info.attention.split(":")[0] in told["attention"]


def test_a_missing_tensor_is_named(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    lost = sorted(tensors)[7]
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors")
    assert run(["check", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert lost in err
    assert out == ""


def test_a_folder_without_weights_can_be_measured_only(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "empty"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert run(["check", str(folder)]) == 2
    assert re.search(r"no weights", capsys.readouterr().err)
    assert run(["check", str(folder), "--load-format", "dummy"]) == 0


def test_a_foreign_model_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    assert run(["check", str(tmp_path)]) == 2
    assert "llava" in capsys.readouterr().err


@pytest.mark.parametrize(
    "template, says",
    [
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ no_such_name.field }}", "no_such_name"),
        ("{{ 1 + 'one' }}", "TypeError"),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", "cuts a message"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "drops the text"),
        # Written for texts: the list that a picture's message holds cannot be added to.
        ("{% for m in messages %}{{ m.content + '!' }}{% endfor %}", "a picture and a text can be asked"),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text or p }}{% endfor %}{% endfor %}", "room for 0"),
    ],
)
def test_a_template_that_can_never_render_is_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, says: str
) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(template)
    assert run(["check", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert says in err and out == ""


def test_quiet_says_nothing_when_all_is_well(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(checkpoint), "-q"]) == 0
    assert capsys.readouterr().out == ""
