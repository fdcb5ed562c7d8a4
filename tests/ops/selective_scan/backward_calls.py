"""Calls of selective_scan's backward pass."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.samples import SampleTensors
from tests.training.backward import packed

TOKENS = ("x", "dt", "B", "C", "z")
OPTIONAL = ("D", "z", "dt_bias", "initial_states", "grad_final_states")


def call(
    *lead: int,
    dim: int = 24,
    dstate: int = 3,
    groups: int | None = 2,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **changes: Any,
) -> dict[str, Any]:
    """A call with tokens of shape `lead` and all that is optional, packed if there are `rows`."""
    make = SampleTensors(torch.device(device), dtype)
    normal = make.normal
    by_group = (dstate,) if groups is None else (groups, dstate)
    n = lead[0] if rows is None else rows
    return {
        "x": normal(*lead, dim),
        "dt": normal(*lead, dim),
        "A": -normal(dim, dstate, dtype=torch.float32).exp(),
        "B": normal(*lead, *by_group),
        "C": normal(*lead, *by_group),
        "D": normal(dim, dtype=torch.float32),
        "z": normal(*lead, dim),
        "dt_bias": normal(dim, dtype=torch.float32),
        "initial_states": normal(n, dim, dstate, dtype=torch.float32),
        "dt_softplus": True,
        "cu_seqlens": None,
        "grad_output": normal(*lead, dim),
        "grad_final_states": normal(n, dim, dstate, dtype=torch.float32),
    } | changes


def calls(dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
    """Calls of rows with no chunk, parts of one, one, and several."""
    at: dict[str, Any] = {"dtype": dtype, "device": device}
    yield call(2, 37, dim=36, **at)
    none: dict[str, Any] = dict.fromkeys(OPTIONAL)
    bare = call(1, 16, groups=None, dt_softplus=False, **none, **at)
    yield {**bare, "dt": bare["dt"].abs()}
    yield call(5, 1, groups=None, dstate=4, **at)
    large = call(2, 19, groups=None, dstate=5, **at)
    factors = torch.tensor([1.0, -5.0, 20.0, 300.0], device=device).repeat(5)[:19].unsqueeze(1)
    large["dt"], large["z"] = ((large[name].abs() * factors).to(dtype) for name in ("dt", "z"))
    yield large
    turned = call(2, 20, groups=1, **at)
    turned |= {n: turned[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("x", "z", "grad_output")}
    yield turned | {"A": turned["A"].t().contiguous().t()}
    yield call(150, **packed(70, 70, 73, 145, device=device), **at)
    wide = packed(4, 6, 30, dtype=torch.int64, device=device)
    yield call(30, z=None, D=None, initial_states=None, dim=33, groups=None, **wide, **at)
