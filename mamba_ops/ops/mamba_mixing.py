"""mamba_mixing: the convolution and the recurrence of one Mamba-1 layer, on decodes and prefills in one batch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._namespace import mamba
from mamba_ops.ops.causal_conv1d import causal_conv1d
from mamba_ops.ops.causal_conv1d_update import causal_conv1d_update
from mamba_ops.ops.checking import floating, one_device, shape_is, short, tensor_rank
from mamba_ops.ops.mixing import (
    SAMPLE_SLOTS,
    Call,
    PlanTensors,
    batch_of,
    check_caches,
    check_plan,
    require_window,
    sample_plans,
)
from mamba_ops.ops.norms import rms_norm
from mamba_ops.ops.selective_scan import selective_scan
from mamba_ops.ops.selective_state_update import selective_state_update
from mamba_ops.registry import Sample, bad_argument, given, may_refuse


@mamba.op(mutates=("conv_state", "ssm_state", "out"), splits_graph=True, reads_host=True, composed=True)
def mamba_mixing(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_norm_weight: Tensor | None,
    B_norm_weight: Tensor | None,
    C_norm_weight: Tensor | None,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    prefill_cu_seqlens: Tensor | None,
    slots: Tensor | None,
    has_initial_state: Tensor | None,
    computed_tokens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    *,
    norm_eps: float = 1e-6,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Mix a batch of decodes and prefills: convolve, project to dt, B and C, advance the states, write gated outputs.

    In Mamba-1 step sizes, B and C are made of what was convolved, so their two projections are in here. What stands
    before and behind it in the layer works on tokens alone; an engine cuts its graph here, as the plan's tensors have
    fixed sizes and its counts are read by the op, not by the graph. It is composed of causal_conv1d, selective_scan,
    causal_conv1d_update and selective_state_update.

    Args:
        projected: `(tokens, 2 * inner)`: x, then gate; tokens of decodes first, padding last.
        conv_state: cache `(slots, inner, state_len)`; state_len at least width - 1, and as many more as a speculative
            decode has tokens beyond its first. Mutated.
        ssm_state: cache `(slots, inner, dstate)`. Mutated.
        conv_weight: `(inner, width)`.
        conv_bias: `(inner,)` or None.
        x_proj_weight: `(dt_rank + 2 * dstate, inner)`: to dt, B and C; in the dtype of `projected`.
        dt_proj_weight: `(inner, dt_rank)`, in the dtype of `projected`.
        dt_proj_bias: `(inner,)`.
        A: `(inner, dstate)`, negative.
        D: `(inner,)`.
        dt_norm_weight, B_norm_weight, C_norm_weight: `(dt_rank,)` and twice `(dstate,)`: weights of RMS norms over dt
            before its projection, B and C, as Jamba has (Falcon-Mamba: ones). None: there is no such norm.
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, computed_tokens, num_accepted_tokens: the
            plan, see `mamba_ops.ops.mixing.PlanTensors` and `mamba_ops.serving.Plan`; all None: no plan.
        norm_eps: added to the norms' mean squares.
        null_slot: a row whose slot is this or negative is nobody: its output is zero, no cache is touched.
        out: `(tokens, inner)`. Mutated. Zero for tokens that no row has; all zero without a plan or rows.

    Rows share two matrix products, whose last bits may change with the number of tokens; nothing else of a row depends
    on the others.

    Raises:
        ValueError: before anything is written: shapes, dtypes, or counts that are not this batch's.
    """
    output = given(out)
    plan = PlanTensors(
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, computed_tokens, num_accepted_tokens
    )
    batch = batch_of(mamba_mixing.qualname, plan, projected.shape[0], null_slot)
    require_window(mamba_mixing.qualname, plan, conv_state, conv_weight)
    (inner, dstate), rank = A.shape, dt_proj_weight.shape[1]
    x, z = projected.split([inner, inner], dim=-1)
    mixed, delta = (x.new_empty(batch.tokens, inner) for _ in range(2))
    low = x.new_empty(batch.tokens, rank + 2 * dstate)
    parts = dt, B, C = low.split([rank, dstate, dstate], dim=-1)
    decodes, prefills = batch.decodes, batch.prefills

    def convolve(step: Call, read: Call) -> None:
        if decodes is not None:
            out = decodes.of(mixed)
            step(decodes.of(x), conv_state, conv_weight, conv_bias, out=out, **decodes.options)
        if prefills is not None:
            options = {"conv_state": conv_state, **prefills.options}
            read(prefills.of(x), conv_weight, conv_bias, out=prefills.of(mixed), **options)

    def scan(step: Call, read: Call) -> None:
        options: dict[str, Any]
        if decodes is not None:
            options = {"D": D, "z": decodes.of(z), "dt_bias": dt_proj_bias, "dt_softplus": True, **decodes.options}
            u, d, b, c, out = map(decodes.of, (mixed, delta, B, C, output))
            step(ssm_state, u, d, A, b, c, out=out, **options)
        if prefills is not None:
            options = {"D": D, "z": prefills.of(z), "delta_bias": dt_proj_bias, "delta_softplus": True}
            u, d, b, c, out = map(prefills.of, (mixed, delta, B, C, output))
            read(u, d, A, b, c, ssm_state=ssm_state, out=out, **options, **prefills.options)

    convolutions, scans = (causal_conv1d_update, causal_conv1d), (selective_state_update, selective_scan)
    if may_refuse(*convolutions, *scans):
        convolve(*(op.require for op in convolutions))
        scan(*(op.require for op in scans))
    convolve(*(op.inside for op in convolutions))
    torch.mm(mixed, x_proj_weight.t(), out=low)
    for part, weight in zip(parts, (dt_norm_weight, B_norm_weight, C_norm_weight), strict=True):
        if weight is not None:
            part.copy_(rms_norm(part, weight, norm_eps))
    torch.mm(dt, dt_proj_weight.t(), out=delta)
    scan(*(op.inside for op in scans))
    batch.clear_rest(output)
    return output


@mamba_mixing.checks
def _checks(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_norm_weight: Tensor | None,
    B_norm_weight: Tensor | None,
    C_norm_weight: Tensor | None,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    prefill_cu_seqlens: Tensor | None,
    slots: Tensor | None,
    has_initial_state: Tensor | None,
    computed_tokens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    output: Tensor,
) -> None:
    tensor_rank("A", A, {2: "(inner, dstate)"})
    tensor_rank("dt_proj_weight", dt_proj_weight, {2: "(inner, dt_rank)"})
    (inner, dstate), rank = A.shape, dt_proj_weight.shape[1]
    if not inner or not dstate:
        raise bad_argument("A", got=f"shape {tuple(A.shape)}", expected="(inner, dstate), neither of them 0")
    tensor_rank("projected", projected, {2: "(tokens, size)"})
    shape_is("projected", projected, (projected.shape[0], 2 * inner), hint=f"x and gate of {inner} channels")
    weights = {
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "x_proj_weight": x_proj_weight,
        "dt_proj_weight": dt_proj_weight,
        "dt_proj_bias": dt_proj_bias,
        "A": A,
        "D": D,
        "dt_norm_weight": dt_norm_weight,
        "B_norm_weight": B_norm_weight,
        "C_norm_weight": C_norm_weight,
    }
    caches = {"conv_state": conv_state, "ssm_state": ssm_state}
    floating(projected=projected, **caches, **weights, out=output)
    one_device(projected.device, "projected", **caches, **weights, out=output)
    shape_is("x_proj_weight", x_proj_weight, (rank + 2 * dstate, inner), hint="to dt, B and C")
    shape_is("dt_proj_weight", dt_proj_weight, (inner, rank))
    for name in ("x_proj_weight", "dt_proj_weight"):
        if weights[name].dtype != projected.dtype:  # type: ignore[union-attr]
            got, expected = (short(t.dtype) for t in (weights[name], projected))  # type: ignore[union-attr]
            raise bad_argument(name, got=got, expected=f"{expected}, as projected", hint="convert it once, beforehand")
    for name in ("dt_proj_bias", "D"):
        shape_is(name, weights[name], (inner,))
    shape_is("dt_norm_weight", dt_norm_weight, (rank,))
    for name in ("B_norm_weight", "C_norm_weight"):
        shape_is(name, weights[name], (dstate,))
    plan = PlanTensors(
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, computed_tokens, num_accepted_tokens
    )
    check_plan(projected.device, plan)
    check_caches(plan, conv_state, ssm_state, conv_weight, conv_bias, inner, (inner, dstate))
    shape_is("out", output, (projected.shape[0], inner))


@mamba_mixing.outputs
def _output(projected: Tensor) -> Tensor:
    return projected.new_empty(projected.shape[0], projected.shape[-1] // 2)


@mamba_mixing.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    inner: int = 24,
    dstate: int = 8,
    dt_rank: int = 5,
    width: int = 4,
) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for name, tokens, plan, null_slot in sample_plans(device):
        other = name == "prefills"  # there every argument that can be another is
        d, s, r = (inner // 2, 2 * dstate, dt_rank + 2) if other else (inner, dstate, dt_rank)
        weights_dtype = torch.float32 if other else dtype
        state_len = width - 1 + (2 if plan.num_accepted_tokens is not None else 0)
        options: dict[str, Any] = {"null_slot": null_slot}
        if name in ("padded", "decodes"):
            options |= {"norm_eps": 0.1, "out": normal(tokens, d, dtype=torch.float32)}
        normed = name not in ("base", "speculative")
        arguments = (
            normal(tokens, 2 * d),
            normal(SAMPLE_SLOTS, state_len, d).transpose(1, 2),
            normal(SAMPLE_SLOTS, d, s, dtype=state_dtype),
            normal(d, width - other, dtype=weights_dtype),
            None if other else normal(d),
            normal(r + 2 * s, d) / d**0.5,
            normal(d, r) / r**0.5,
            normal(d, dtype=weights_dtype),
            -normal(d, s, dtype=torch.float32).exp(),
            normal(d, dtype=weights_dtype),
            *(normal(size, dtype=weights_dtype) if normed else None for size in (r, s, s)),
        )
        yield Sample(name, (*arguments, *plan), options)
