"""What `mamba-ops bench` times of selective_state_update, and the peers of it."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.bench import MAMBA1, MAMBA2, Call, Case, NotTaken
from mamba_ops.ops.selective_state_update.op import selective_state_update

selective_state_update.bench_host("one token", 4, 1, heads=8, dim=64, dstate=128, groups=1)


def case(version: int, state_dtype: torch.dtype, rows: int, device: torch.device, *, scale: str | None = None) -> Case:
    """One decode step of a Mamba-2 layer (A, dt, D tied over a head's channels) or of a gated Mamba-1 layer."""
    scale = scale or bench.scale_of(device)
    shapes: tuple[tuple[int, ...], ...]
    if version == 2:
        heads, dim, dstate, groups, _ = MAMBA2[scale]
        shapes = (heads, dim), (heads,), (heads,), (groups, dstate)
    else:
        dim, dstate, _ = MAMBA1[scale]
        shapes = (dim,), (dim,), (dim, dstate), (dstate,)
    x_shape, dt_shape, A_shape, B_shape = shapes
    make = partial(bench.random, device=device)
    slots, tables = bench.slot_tables(rows, math.prod(x_shape) * dstate * state_dtype.itemsize, device)
    arguments: dict[str, Any] = {
        "x": make(rows, *x_shape),
        "dt": make(rows, *dt_shape),
        "A": -1 - 15 * torch.rand(A_shape, device=device),
        "B": make(rows, *B_shape),
        "C": make(rows, *B_shape),
        "D": make(*dt_shape),
        "dt_bias": make(*dt_shape) - 3,
        **({"z": make(rows, *x_shape)} if version == 1 else {}),
        "slots": tables[0],
        "dt_softplus": True,
    }
    state = torch.randn(slots, *x_shape, dstate, device=device, dtype=state_dtype)
    name = f"Mamba-{version}, {bench.of_rows(rows)}, {str(state_dtype).removeprefix('torch.')} state"
    out = torch.empty_like(arguments["x"])
    return Case(selective_state_update, name, arguments, {"ssm_state": state}, out, tables)


BF16, F32 = torch.bfloat16, torch.float32
LARGE = [(2, BF16, 1), (2, F32, 1), (2, BF16, 64), (2, BF16, 256), (1, BF16, 64)]
SMALL = [(2, F32, 1), (2, F32, 16), (1, F32, 1), (1, F32, 16)]
selective_state_update.bench_cases(bench.by_scale(case, large=LARGE, small=SMALL))


def _tied(case: Case) -> dict[str, Any]:
    """Return the arguments, with those that ours has one of per head as others recognise the same: by strides of 0."""
    given, x, dstate = dict(case.arguments), case.arguments["x"], case.arguments["B"].shape[-1]
    if x.dim() == 3:
        dim = x.shape[-1]
        given |= {n: given[n][..., None].expand(*given[n].shape, dim) for n in ("dt", "D", "dt_bias")}
        given["A"] = given["A"][:, None, None].expand(-1, dim, dstate)
    return given


def _triton(case: Case, module: Callable[[str], Any], *, of: str, has_out: bool) -> Call:
    """The kernel that vLLM and mamba_ssm share by origin."""
    kernel, given = module(of).selective_state_update, _tied(case)
    x, dt, A, B, C = (given[name] for name in ("x", "dt", "A", "B", "C"))
    options = {name: given.get(name) for name in ("D", "z", "dt_bias", "dt_softplus")}
    options |= {"out": case.out} if has_out else {}

    def call(caches: Mapping[str, Tensor], slots: Tensor) -> Any:
        out = kernel(caches["ssm_state"], x, dt, A, B, C, state_batch_indices=slots, **options)
        return case.out if has_out else out

    return call


VLLM, MAMBA_SSM = "vllm.model_executor.layers.mamba.ops.mamba_ssm", "mamba_ssm.ops.triton.selective_state_update"
selective_state_update.bench_peer("vLLM")(partial(_triton, of=VLLM, has_out=True))
selective_state_update.bench_peer("mamba_ssm")(partial(_triton, of=MAMBA_SSM, has_out=False))


@selective_state_update.bench_peer("FlashInfer")
def _flashinfer(case: Case, module: Callable[[str], Any]) -> Call:
    """FlashInfer's kernel on views that are made before the clock starts."""
    kernel, given = module("flashinfer.mamba").selective_state_update, _tied(case)
    if given["x"].dim() != 3:
        raise NotTaken("takes the state of Mamba-2 alone")
    x, dt, A, B, C, D = (given[name] for name in ("x", "dt", "A", "B", "C", "D"))
    options = {"dt_bias": given["dt_bias"], "dt_softplus": given["dt_softplus"], "out": case.out}

    def call(caches: Mapping[str, Tensor], slots: Tensor) -> Any:
        kernel(caches["ssm_state"], x, dt, A, B, C, D, state_batch_indices=slots, **options)
        return case.out

    return call
