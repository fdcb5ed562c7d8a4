"""Operands of matrix products in tf32: rounded to its eleven digits before matrix units cut off the rest."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import to_be_multiplied
from tests.conftest import ACCELERATOR

DEVICE = ACCELERATOR or torch.device("cpu")
SIZE = 256


@triton.jit
def _round(numbers, rounded, PRECISION: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(rounded + i, to_be_multiplied(tl.load(numbers + i), PRECISION))


def rounded(numbers: torch.Tensor, precision: str) -> torch.Tensor:
    found = torch.empty_like(numbers)
    _round[(1,)](numbers, found, precision, len(numbers))
    return found.cpu()


def test_float32_is_rounded_to_the_nearest_of_eleven_digits() -> None:
    numbers = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-100, 28).repeat(2)
    found = rounded(numbers.to(DEVICE), "tf32")
    mantissa, exponent = torch.frexp(numbers.double())
    assert torch.equal(found.double(), torch.ldexp((mantissa * 2**11).round() / 2**11, exponent))
    assert (found.abs() > numbers.abs()).sum() > SIZE // 4  # nothing is cut off
    assert (found.view(torch.int32) & 0x1FFF).count_nonzero() == 0  # so that nothing is left to be


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "bf16x3"])
def test_other_precisions_take_all_digits(precision: str) -> None:
    numbers = torch.randn(SIZE, device=DEVICE)
    assert torch.equal(rounded(numbers, precision), numbers.cpu())


def test_what_is_not_finite() -> None:
    inf, most = torch.inf, torch.finfo(torch.float32).max
    numbers = torch.tensor([inf, -inf, 0.0, -0.0, most, -most, torch.nan, torch.nan], device=DEVICE)
    numbers.view(torch.int32)[7] = 0x7FFFFFFF  # the NaN that GPUs make
    found = rounded(numbers, "tf32")
    assert torch.equal(found[:6], torch.tensor([inf, -inf, 0.0, -0.0, inf, -inf]))
    assert torch.signbit(found[3])
    assert found[6:].isnan().all()
