"""Launching: what is looked up once, and that Triton gets the same arguments either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qvl.kernels import gpu
from tests.kernels.driver import Driver, driver, fresh

__all__ = ["driver"]


def same(first: tuple[Any, ...], again: tuple[Any, ...]) -> bool:
    """What Triton's launcher got from Triton, and from us: an address is as good as its tensor, hooks are left out."""
    plain = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in first]
    return plain[:6] == list(again[:6]) and again[6:9] == (None, None, None) and plain[9:] == list(again[9:])


def test_triton_gets_the_same_arguments_once_more(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    from qvl.kernels.on_gpu import ops_tower

    for kernel in (ops_tower._quick_gelu, ops_tower._rotate):
        fresh(monkeypatch, kernel)
    x, angles = torch.zeros(5, 3, 8, dtype=torch.bfloat16), torch.zeros(5, 1, 8)
    ways: list[Callable[[], object]] = [
        lambda: ops_tower.quick_gelu(x),
        lambda: ops_tower.rotate(x[:, :2], angles, angles),
    ]
    for launch in ways:
        for _ in range(3):
            launch()
        first, second, third = driver.seen
        driver.seen.clear()
        assert same(first, second)
        assert second == third
        assert first[3] == 77


def test_so_it_is_with_descriptions_of_tensors(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    from qvl.kernels.on_gpu import attention_segments, ops_tower

    fresh(monkeypatch, ops_tower._quick_gelu)
    compiled = ops_tower._quick_gelu[(1,)](torch.zeros(8), 8, BLOCK=8)
    # Compiling it takes long, and another stands for it: what the launcher gets is not what was compiled.
    kernel = fresh(monkeypatch, attention_segments._segments)
    monkeypatch.setattr(kernel, "_do_compile", lambda *_: compiled)
    driver.seen.clear()
    tiles = torch.from_numpy(attention_segments.tiles_of([200, 56], 64))
    qkv = torch.zeros(256, 3, 2, 80, dtype=torch.bfloat16)
    for memory in (qkv, qkv, qkv.clone()):
        attention_segments.attend_segments(memory, tiles, 64)
    first, second, third = driver.seen
    assert same(first, second)
    boxes = [box.block_shape for box in second[9:13]]
    assert boxes == [[64, 64], [64, 16], [128, 64], [128, 16]]
    assert {box.base.data_ptr() for box in second[9:13]} == {qkv.data_ptr()}
    assert qkv.data_ptr() not in {box.base.data_ptr() for box in third[9:13]}
    assert [box.block_shape for box in third[9:13]] == boxes
    assert list(second[9].shape) == [256, 3 * 2 * 80]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError("ptxas died\nand said more"), "the kernel did not run (OSError: ptxas died)"),
        (ImportError("no module"), "Triton cannot be imported (no module)"),
    ],
)
def test_a_trial_that_fails_says_why(error: Exception, says: str) -> None:
    def fails() -> str:
        raise error

    assert gpu.problem_of_trial("the kernel", fails) == says
    assert gpu.problem_of_trial("the kernel", lambda: "wrong by 3 %") == "wrong by 3 %"
    assert gpu.problem_of_trial("the kernel", lambda: None) is None


class Kernel:
    """Writes down what is asked of it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def warmup(self, *arguments: object, grid: tuple[int, ...], **constants: Any) -> None:
        self.seen.append(("compiled", constants))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self.seen.append(("ran", constants))


class Compiled(Kernel):
    """Gives back, as Triton does, something that runs the same compilation again with all arguments in order."""

    arg_names = ("x_ptr", "n", "BLOCK")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: object, **constants: Any) -> Again:
            self.seen.append(("looked up", constants))
            return Again(self)

        return run


class Again:
    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def run(self, x: int, y: int, z: int, stream: int, *told: object) -> None:
        assert told[:5] == ("function", "metadata", None, None, None)
        self.kernel.seen.append((f"ran on {(x, y, z)}", {"values": told[5:]}))


@pytest.mark.usefixtures("driver")
def test_what_triton_compiled_is_looked_up_once_for_every_kind_of_call() -> None:
    kernel = Compiled()
    memory = torch.zeros(64)

    def looked_up(x: torch.Tensor, n: int, block: int = 32) -> bool:
        """Whether Triton was asked; else the same compilation ran with these values."""
        gpu.launch(kernel, (2,), x, n, num_warps=4, BLOCK=block)
        done, details = kernel.seen.pop()
        if done != "looked up":
            assert (done, details) == ("ran on (2, 1, 1)", {"values": (x.data_ptr(), n, block)})
        return done == "looked up"

    assert looked_up(memory, 32)
    assert not looked_up(memory, 32)
    assert not looked_up(memory[4:], 48)  # another address, another multiple of 16
    assert looked_up(memory[1:], 32)  # an address that is no multiple of 16
    assert looked_up(memory, 33)
    assert not looked_up(memory, 35)
    assert looked_up(memory, 1)
    assert looked_up(memory, 2**40)
    assert looked_up(memory.to(torch.bfloat16), 32)
    assert looked_up(memory, 32, block=64)
    assert not looked_up(memory[1:], 16)
    for _ in range(2):  # Triton alone knows what it compiles for other things
        gpu.launch(kernel, (2,), memory, object(), num_warps=4, BLOCK=32)
        assert kernel.seen.pop()[0] == "looked up"


@pytest.mark.usefixtures("driver")
def test_a_description_of_a_tensor_is_looked_up_by_what_it_says_of_itself() -> None:
    kernel = Compiled()
    memory = torch.zeros(64)

    def looked_up(descriptor: object, kind: str) -> bool:
        """Whether Triton was asked, with what is described; else the same compilation ran with that."""
        gpu.launch(kernel, (2,), gpu.Described(descriptor, kind), memory, num_warps=4, BLOCK=32)
        done, details = kernel.seen.pop()
        if done == "looked up":
            return True
        assert details["values"][0] is descriptor
        return False

    first, second = object(), object()
    assert looked_up(first, "bfloat16 64 64")
    assert not looked_up(first, "bfloat16 64 64")
    assert not looked_up(second, "bfloat16 64 64")
    assert looked_up(second, "bfloat16 128 64")


@pytest.mark.parametrize(
    ("count", "size", "parts", "filled"), [(1, 4, 1, 1), (4, 4, 1, 4), (5, 4, 2, 8), (80, 64, 2, 128)]
)
def test_parts_and_powers(count: int, size: int, parts: int, filled: int) -> None:
    assert (gpu.cdiv(count, size), gpu.next_power_of_2(count)) == (parts, filled)
