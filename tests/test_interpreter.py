"""What tests replace in Triton's interpreter leaves what kernels compute, and Triton itself, as they were."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
from triton import language as tl
from triton.runtime import interpreter

from tests.conftest import ACCELERATOR

pytestmark = pytest.mark.skipif(ACCELERATOR is not None, reason="nothing is interpreted here")


@triton.jit
def _scaled(x, factor):
    return tl.sum(x * factor.to(x.dtype))


@triton.jit
def _sums(x, out, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    values = tl.load(x + row * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    for _ in range(rows):
        tl.store(out + row, tl.load(out + row) + _scaled(values, row + 1))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by an entry whenever the interpreter looks through a module or a class for what to replace."""
    seen: list[Any] = []
    look = interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *args: (seen.append(args[0]), look(*args)))
    return seen


def sums(x: Tensor, times: int) -> Tensor:
    out = torch.zeros(x.shape[0])
    _sums[(x.shape[0],)](x, out, times, BLOCK=x.shape[1])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_device_functions_are_right(dtype: torch.dtype) -> None:
    x = torch.randint(-8, 8, (3, 16)).to(dtype)
    assert torch.equal(sums(x, 5), 5 * x.float().sum(1) * torch.tensor([1.0, 2.0, 3.0]))


def test_the_language_is_looked_through_once_in_a_launch(looks: list[Any]) -> None:
    sums(torch.ones(1, 16), 1)
    few = len(looks)
    looks.clear()
    sums(torch.ones(3, 16), 9)
    assert 0 < len(looks) <= few
    looks.clear()
    sums(torch.ones(3, 16), 9)
    assert looks  # the next launch does it again


def test_the_language_is_put_back() -> None:
    before = {name: getattr(tl, name) for name in ("load", "store", "sum", "range", "static_range")}
    sums(torch.ones(2, 16), 2)
    assert {name: getattr(tl, name) for name in before} == before


def test_an_error_in_a_kernel_leaves_the_next_one_right() -> None:
    x = torch.ones(2, 16)
    with pytest.raises(Exception, match="power of 2"):
        _sums[(2,)](x, torch.zeros(2), 1, BLOCK=3)
    assert torch.equal(sums(x, 1), torch.tensor([16.0, 32.0]))
