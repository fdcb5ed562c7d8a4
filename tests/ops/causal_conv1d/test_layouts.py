"""causal_conv1d reads and writes activations and caches where they lie, whichever of their axes is contiguous."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mamba_ops import causal_conv1d
from mamba_ops.ops.causal_conv1d.triton import forward
from mamba_ops.registry import Sample
from mamba_ops.testing.judge import front_on
from tests.conftest import ACCELERATOR
from tests.harness import judge

pytestmark = pytest.mark.usefixtures("no_grad")
DEVICE = ACCELERATOR or torch.device("cpu")
ENDS = (0, 70, 70, 73, 73 + 150, 256)
"""Sequences that begin within a tile, end within one, have none, and have tiles that are whole."""


def activation(*shape: int, by_token: bool, dtype: torch.dtype, before: int = 0) -> Tensor:
    """Normal numbers whose channels, or tokens, are contiguous, after so many that are not of it."""
    lead, (tokens, dim) = shape[:-2], shape[-2:]
    wide = torch.randn(*lead, *((dim, tokens + 8) if by_token else (tokens, dim + 8)), device=DEVICE).to(dtype)
    own = wide[..., before : before + (tokens if by_token else dim)]
    return own.transpose(-1, -2) if by_token else own


def call(
    x_by_token: bool,
    out_by_token: bool,
    *,
    packed: bool = True,
    dtype: torch.dtype = torch.float32,
    width: int = 4,
    before: int = 0,
    dim: int = 24,
    **changes: Any,
) -> Sample:
    torch.manual_seed(0)
    shape = (ENDS[-1], dim) if packed else (3, 136, dim)
    rows = len(ENDS) - 1 if packed else 3
    slots = torch.tensor([5, 3, 0, 1, 6, 4][:rows], device=DEVICE)
    arguments = {
        "bias": torch.randn(dim, device=DEVICE).to(dtype),
        "cu_seqlens": torch.tensor(ENDS, device=DEVICE) if packed else None,
        "conv_state": torch.randn(7, dim, width - 1, device=DEVICE).to(dtype),
        "slots": slots,
        "has_initial_state": slots != 0,
        "out": activation(*shape, by_token=out_by_token, dtype=dtype),
    }
    x = activation(*shape, by_token=x_by_token, dtype=dtype, before=before)
    return Sample("", (x, torch.randn(dim, width, device=DEVICE).to(dtype)), arguments | changes)


def check(sample: Sample) -> None:
    judge(causal_conv1d, sample, front_on(causal_conv1d, "triton"))


BY_TOKEN = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize(("x_by_token", "out_by_token"), BY_TOKEN)
def test_each_layout_of_x_with_each_of_the_output(x_by_token: bool, out_by_token: bool, packed: bool) -> None:
    check(call(x_by_token, out_by_token, packed=packed))


@pytest.mark.parametrize(("x_by_token", "out_by_token"), BY_TOKEN)
def test_activations_that_start_anywhere(x_by_token: bool, out_by_token: bool) -> None:
    check(call(x_by_token, out_by_token, before=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [2, 4, 5, 8])
def test_widths_and_dtypes_with_contiguous_tokens(width: int, dtype: torch.dtype) -> None:
    check(call(True, width % 2 == 0, dtype=dtype, width=width, dim=8))


def test_contiguous_tokens_of_mixed_dtypes() -> None:
    state = torch.randn(7, 3, 24, device=DEVICE).half().transpose(1, 2)
    check(call(True, True, dtype=torch.bfloat16, conv_state=state, bias=None, silu=False))
    check(call(True, False, width=7, dim=8))


def test_padding_and_write_slots_with_contiguous_tokens() -> None:
    write_slots = torch.tensor([5, 2, -1, 4, 0], device=DEVICE)
    check(call(True, True, slots=torch.tensor([5, 3, -1, 1, 6], device=DEVICE), write_slots=write_slots))
    check(call(True, True, conv_state=None, slots=None, has_initial_state=None))


@pytest.mark.parametrize("by_token", [True, False])
def test_no_token_of_another_sequence_is_looked_at(by_token: bool) -> None:
    """Infinite inputs, of padding and of no sequence, reach no other one."""
    ends = torch.tensor([0, 70, 70, 73, 223], device=DEVICE)
    slots = torch.tensor([5, 3, -1, 1], device=DEVICE)
    sample = call(by_token, by_token, cu_seqlens=ends, slots=slots, has_initial_state=slots == 1)
    sample.args[0][70:73] = sample.args[0][223:] = torch.inf
    check(sample)


@pytest.mark.parametrize(("x_by_token", "out_by_token"), BY_TOKEN)
def test_nothing_is_copied(x_by_token: bool, out_by_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    kernel = forward._runs if x_by_token or out_by_token else forward._kernel

    class Noting:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **launch: given.append(arguments) or kernel[grid](*arguments, **launch)

    monkeypatch.setattr(forward, "_runs" if x_by_token or out_by_token else "_kernel", Noting())
    sample = call(x_by_token, out_by_token)
    front_on(causal_conv1d, "triton")(*sample.args, **sample.kwargs)
    *_, arguments = given  # on a GPU a rehearsal of the launch comes first
    assert arguments[0] is sample.args[0]
    assert arguments[4] is sample.kwargs["conv_state"]
    assert arguments[8] is sample.kwargs["out"]
