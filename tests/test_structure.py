"""The house holds: levels import downward only, torch stays in its place, files stay small, nothing is left undone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qvl"
MAX_LINES = 350

# docs/structure.md draws the same table. A package stands for all modules below it; the longest name decides.
LEVELS = {
    "qvl": 0,
    "qvl.errors": 0,
    "qvl.types": 0,
    "qvl.media": 1,
    "qvl.specs": 1,
    "qvl.prompt": 1,
    "qvl.tokenizer": 1,
    "qvl.wire": 1,
    "qvl.layers": 2,
    "qvl.kernels": 2,
    "qvl.models": 2,
    "qvl.engine": 3,
    "qvl.backends": 4,
    "qvl.client": 5,
    "qvl.memory": 5,
    "qvl.batch": 5,
    "qvl.tasks": 5,
    "qvl.bench": 5,
    "qvl.server": 6,
    "qvl.cli": 6,
    "qvl.__main__": 6,
}
# Whether a module may import torch when it is imported: the longest name decides. Everything that must not is what an
# HTTP process or a client loads.
TORCH = {
    "qvl": False,
    "qvl.layers": True,
    "qvl.kernels": True,
    "qvl.kernels.compilers": False,
    "qvl.kernels.compiler_process": False,
    "qvl.kernels.native": False,
    "qvl.kernels.triton_cache": False,
    "qvl.models": True,
    "qvl.bench": True,
    "qvl.bench.load": False,
    "qvl.bench.shape": False,
    "qvl.bench.vocabulary": False,
    "qvl.engine": True,
    "qvl.engine.answers": False,
    "qvl.engine.batch": False,
    "qvl.engine.block_manager": False,
    "qvl.engine.config": False,
    "qvl.engine.detokenizer": False,
    "qvl.engine.intake": False,
    "qvl.engine.encoder_cache": False,
    "qvl.engine.grammar": False,
    "qvl.engine.grammar_worker": False,
    "qvl.engine.head_start": False,
    "qvl.engine.host_memory": False,
    "qvl.engine.hub": False,
    "qvl.engine.loading": False,
    "qvl.engine.locate": False,
    "qvl.engine.messages": False,
    "qvl.engine.options": False,
    "qvl.engine.protocol": False,
    "qvl.engine.scheduler": False,
    "qvl.engine.sequence": False,
    "qvl.engine.start_clock": False,
    "qvl.engine.step": False,
    "qvl.engine.worker": False,
}
# Names that a package offers lazily (PEP 562), so that importing the package loads nothing of it.
LAZY = {"qvl"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def longest(name: str, table: Iterable[str]) -> str:
    """The entry of `table` that is `name` or the closest package above it."""
    return max((entry for entry in table if name == entry or name.startswith(entry + ".")), key=len)


def level(name: str) -> int:
    entry = longest(name, LEVELS)
    assert entry != "qvl" or name == "qvl", f"{name} stands on no level: add it to LEVELS and to docs/structure.md"
    return LEVELS[entry]


def imports(path: Path, *, when_imported: bool = False) -> Iterator[str]:
    """Full names that a module imports; `when_imported` leaves out functions' own imports and TYPE_CHECKING blocks."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".")[: None if path.name == "__init__.py" else -1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children = node.orelse if when_imported else node.body + node.orelse
        elif when_imported and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            children = []
        else:
            children = list(ast.iter_child_nodes(node))
        for child in children:
            yield from visit(child)

    return visit(ast.parse(path.read_text(encoding="utf-8")))


TORCH_FREE = [name for name in MODULES if not TORCH[longest(name, TORCH)]]


def upward(name: str, path: Path) -> list[str]:
    mine = level(name)
    return [
        other for other in imports(path) if other.split(".")[0] == "qvl" and other in MODULES and level(other) > mine
    ]


@pytest.mark.parametrize("name", sorted(set(MODULES) - LAZY))
def test_imports_go_downward(name: str) -> None:
    assert upward(name, MODULES[name]) == []


def test_an_upward_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: a layer that imports the engine, inside a function even, is caught."""
    bad = PACKAGE / "layers" / "bad.py"
    source = tmp_path / "bad.py"
    source.write_text("def f():\n    from qvl.engine import protocol\n    import qvl.server.app\n")
    monkeypatch.setitem(MODULES, "qvl.server.app", PACKAGE / "server" / "app.py")
    monkeypatch.setitem(MODULES, "qvl.layers.bad", bad)
    assert upward("qvl.layers.bad", source) == ["qvl.engine.protocol", "qvl.server.app"]


def loads_torch(name: str, seen: set[str]) -> list[str]:
    """A chain of imports from `name` to torch, empty when there is none."""
    seen.add(name)
    packages = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
    for other in [*imports(MODULES[name], when_imported=True), *packages]:
        if other.split(".")[0] in ("torch", "transformers"):
            return [name, other]
        if other in MODULES and other not in seen:
            chain = loads_torch(other, seen)
            if chain:
                return [name, *chain]
    return []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_no_torch_outside_its_modules(name: str) -> None:
    assert loads_torch(name, set()) == []


def test_a_chain_to_torch_is_seen() -> None:
    assert loads_torch("qvl.layers.attention", set())[-1] == "torch"


def test_the_http_process_and_the_client_load_no_torch() -> None:
    """The same by running it: what the parser of imports could miss."""
    code = f"import importlib, sys\nfor n in {TORCH_FREE!r}: importlib.import_module(n)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_the_shipped_engine_never_names_the_oracle() -> None:
    """transformers is compared with, in tests and benchmarks; nothing that serves imports it."""
    users = [n for n, p in MODULES.items() if any(i.split(".")[0] == "transformers" for i in imports(p))]
    assert all(name.startswith("qvl.bench.") for name in users), users


def test_files_stay_small() -> None:
    sizes = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES.values()}
    assert {path: lines for path, lines in sizes.items() if lines > MAX_LINES} == {}


def test_every_helper_has_a_named_home() -> None:
    assert [n for n in MODULES if re.fullmatch(r"utils?|helpers?|common|misc", n.rsplit(".", 1)[-1])] == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_say_what_they_know(name: str) -> None:
    source = MODULES[name].read_text(encoding="utf-8")
    if source.strip():
        assert ast.get_docstring(ast.parse(source)), f"{name} has no docstring"
    assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", source), f"{name} leaves something undone"


def test_nothing_from_the_outside_is_unpickled() -> None:
    """`torch.load` and pickle run code from their input; checkpoints are safetensors and frames are msgpack."""
    forbidden = re.compile(r"\btorch\.load\b|\bimport c?[pP]ickle|\bfrom pickle\b|(?<![.\w])(?:eval|exec)\(")
    found = {n: m.group() for n, p in MODULES.items() if (m := forbidden.search(p.read_text(encoding="utf-8")))}
    assert found == {}


def test_the_drawn_house_is_the_real_one() -> None:
    """docs/structure.md names every entry of LEVELS on its level."""
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    drawn = {
        name: int(m[1])
        for m in re.finditer(r"^\| (\d) \|.*$", page, re.M)
        for name in re.findall(r"`(qvl\.\w+)`", m[0])
    }
    assert drawn == {name: number for name, number in LEVELS.items() if name != "qvl"}


@pytest.mark.parametrize("package", ["engine", "kernels"])
def test_the_table_of_a_package_has_every_file(package: str) -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    table = page.split(f"| in `qvl/{package}` | |")[1].split("\n\n")[0]
    files = [path.stem for path in (PACKAGE / package).rglob("*.py") if path.stem != "__init__"]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(files)


@pytest.mark.parametrize("package", ["server", "backends", "models"])
def test_the_docstring_of_a_package_has_every_file(package: str) -> None:
    page = (PACKAGE / package / "__init__.py").read_text(encoding="utf-8")
    named = [name for line in re.findall(r"^    (.+?)  ", page, re.M) for name in line.split()]
    assert sorted(named) == sorted(path.stem for path in (PACKAGE / package).glob("[!_]*.py"))


def test_every_name_of_the_walk_exists() -> None:
    """`module.Class.method` of "One request, end to end" can be found in the source."""
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    walk = page.split("## One request, end to end")[1].split("## ")[0]
    for dotted in re.findall(r"^ +((?:\w+\.)+\w+)", walk, re.M):
        parts = dotted.split(".")
        homes = [n for n in range(len(parts), 0, -1) if ".".join(["qvl", *parts[:n]]) in MODULES]
        if not homes:
            parts, homes = ["engine", *parts], [2]
        source = MODULES[".".join(["qvl", *parts[: homes[0]]])]
        folder = [source, *source.parent.glob("*.py")] if source.name == "__init__.py" else [source]
        text = "\n".join(path.read_text(encoding="utf-8") for path in folder)
        missing = [name for name in parts[homes[0] :] if not re.search(rf"\b(?:def|class) {name}\b", text)]
        assert missing == [], dotted
