"""mamba2_mixing: the convolution and the recurrence of one Mamba-2 layer, on decodes and prefills in one batch."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mamba_ops.ops._namespace import mamba
from mamba_ops.ops.causal_conv1d import causal_conv1d
from mamba_ops.ops.causal_conv1d_update import causal_conv1d_update
from mamba_ops.ops.checking import floating, one_device, shape_is, tensor_rank
from mamba_ops.ops.mamba_chunk_scan import mamba_chunk_scan
from mamba_ops.ops.mixing import (
    SAMPLE_SLOTS,
    Call,
    PlanTensors,
    Rows,
    batch_of,
    by_head,
    check_caches,
    check_plan,
    each_kind,
    like_convolved,
    require_window,
    sample_plans,
)
from mamba_ops.ops.selective_state_update import selective_state_update
from mamba_ops.registry import Sample, bad_argument, given


@mamba.op(mutates=("conv_state", "ssm_state", "out"), splits_graph=True, reads_host=True, composed=True)
def mamba2_mixing(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    prefill_cu_seqlens: Tensor | None,
    slots: Tensor | None,
    has_initial_state: Tensor | None,
    computed_tokens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    heads: int,
    head_dim: int,
    dstate: int,
    groups: int,
    chunk_size: int,
    *,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Mix a batch of decodes and prefills: convolve, advance the states, and write every token's output.

    What stands before it in the layer (the projection) and behind it (gated norm, projection) works on tokens alone, so
    an engine cuts its graph here: the plan's tensors have fixed sizes and its counts are read by the op, not by the
    graph. It is composed of causal_conv1d, mamba_chunk_scan, causal_conv1d_update and selective_state_update.

    Args:
        projected: `(tokens, 2 * heads * head_dim + 2 * groups * dstate + heads)`: gate (not read), x, B, C, dt; tokens
            of decodes first, padding last.
        conv_state: cache `(slots, dim, state_len)`, dim = heads * head_dim + 2 * groups * dstate; state_len at least
            width - 1, and as many more as a speculative decode has tokens beyond its first. Mutated.
        ssm_state: cache `(slots, heads, head_dim, dstate)`. Mutated.
        conv_weight: `(dim, width)`.
        conv_bias: `(dim,)` or None.
        A: `(heads,)`, negative.
        D: `(heads,)`.
        dt_bias: `(heads,)`.
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, computed_tokens, num_accepted_tokens: the
            plan, see `mamba_ops.ops.mixing.PlanTensors` and `mamba_ops.serving.Plan`; all None: no plan.
        heads, head_dim, dstate, groups: the layer's sizes on this rank.
        chunk_size: tokens of a chunk in prefills, at most; chunks end at multiples of it from a request's first token.
        dt_min, dt_max: limits of the step sizes after their softplus.
        null_slot: a row whose slot is this or negative is nobody: its output is zero, no cache is touched.
        out: `(tokens, heads, head_dim)`. Mutated. Zero for tokens that no row has; all zero without a plan or rows.

    Raises:
        ValueError: before anything is written: shapes, dtypes, or counts that are not this batch's.
    """
    output = given(out)
    plan = PlanTensors(
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, computed_tokens, num_accepted_tokens
    )
    batch = batch_of(mamba2_mixing.qualname, plan, projected.shape[0], null_slot)
    require_window(mamba2_mixing.qualname, plan, conv_state, conv_weight)
    inner, bc = heads * head_dim, groups * dstate
    _, mixed, dt = projected.split_with_sizes([inner, inner + 2 * bc, heads], dim=-1)
    sizes = (heads, head_dim), (groups, dstate), (groups, dstate)

    def read(rows: Rows, convolve: Call, scan: Call) -> None:
        convolved = convolve(rows.of(mixed), conv_weight, conv_bias, conv_state=conv_state, **rows.options)
        x, B, C = by_head(like_convolved(rows.of(mixed)) if convolved is None else convolved, *sizes)
        scan(
            x,
            rows.of(dt),
            A,
            B,
            C,
            chunk_size,
            D=D,
            dt_bias=dt_bias,
            dt_softplus=True,
            dt_min=dt_min,
            dt_max=dt_max,
            computed_tokens=batch.computed_tokens,
            ssm_state=ssm_state,
            out=rows.of(output),
            **rows.options,
        )

    def step(rows: Rows, convolve: Call, update: Call) -> None:
        convolved = convolve(rows.of(mixed), conv_state, conv_weight, conv_bias, **rows.options)
        x, B, C = by_head(like_convolved(rows.of(mixed)) if convolved is None else convolved, *sizes)
        d, bias = rows.of(dt), dt_bias
        if limited := dt_min > 0 or dt_max < math.inf:  # the update has no limits of its own
            compute = torch.promote_types(d.dtype, torch.float32)
            d = functional.softplus(d.to(compute) + dt_bias.to(compute)).clamp(dt_min, dt_max)
        update(
            ssm_state,
            x,
            d,
            A,
            B,
            C,
            D=D,
            dt_bias=None if limited else bias,
            dt_softplus=not limited,
            out=rows.of(output),
            **rows.options,
        )

    each_kind(batch, step, (causal_conv1d_update, selective_state_update), read, (causal_conv1d, mamba_chunk_scan))
    batch.clear_rest(output)
    return output


@mamba2_mixing.checks
def _checks(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    prefill_cu_seqlens: Tensor | None,
    slots: Tensor | None,
    has_initial_state: Tensor | None,
    computed_tokens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    heads: int,
    head_dim: int,
    dstate: int,
    groups: int,
    chunk_size: int,
    dt_min: float,
    dt_max: float,
    output: Tensor,
) -> None:
    for name, value in (("heads", heads), ("head_dim", head_dim), ("dstate", dstate), ("chunk_size", chunk_size)):
        if value < 1:
            raise bad_argument(name, got=value, expected="a positive number")
    if groups < 1 or heads % groups:
        raise bad_argument("groups", got=groups, expected=f"a divisor of the {heads} heads")
    if not dt_min <= dt_max:
        raise bad_argument("dt_min", got=dt_min, expected=f"at most dt_max, which is {dt_max}")
    inner, dim = heads * head_dim, heads * head_dim + 2 * groups * dstate
    tensor_rank("projected", projected, {2: "(tokens, size)"})
    hint = f"gate, x, B, C and dt of {heads} heads of {head_dim} and {groups} groups of {dstate}"
    shape_is("projected", projected, (projected.shape[0], inner + dim + heads), hint=hint)
    tensors = {"conv_weight": conv_weight, "conv_bias": conv_bias, "A": A, "D": D, "dt_bias": dt_bias}
    floating(projected=projected, conv_state=conv_state, ssm_state=ssm_state, **tensors, out=output)
    caches = {"conv_state": conv_state, "ssm_state": ssm_state}
    one_device(projected.device, "projected", **caches, **tensors, out=output)
    for name in ("A", "D", "dt_bias"):
        shape_is(name, tensors[name], (heads,))
    plan = PlanTensors(
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, computed_tokens, num_accepted_tokens
    )
    check_plan(projected.device, plan)
    check_caches(plan, conv_state, ssm_state, conv_weight, conv_bias, dim, (heads, head_dim, dstate))
    shape_is("out", output, (projected.shape[0], heads, head_dim))


@mamba2_mixing.outputs
def _output(projected: Tensor, heads: int, head_dim: int) -> Tensor:
    return projected.new_empty(projected.shape[0], heads, head_dim)


@mamba2_mixing.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    heads: int = 4,
    head_dim: int = 8,
    dstate: int = 16,
    groups: int = 2,
    width: int = 4,
    chunk_size: int = 8,
) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for name, tokens, plan, null_slot in sample_plans(device):
        other = name == "prefills"  # there every argument that can be another is
        h, p, s, g = (2 * heads, head_dim // 2, 2 * dstate, 1) if other else (heads, head_dim, dstate, groups)
        weights_dtype = torch.float32 if other else dtype
        dim = h * p + 2 * g * s
        state_len = width - 1 + (2 if plan.num_accepted_tokens is not None else 0)
        options: dict[str, Any] = {"null_slot": null_slot}
        if name in ("padded", "decodes"):
            options |= {"dt_min": 0.1, "dt_max": 0.7, "out": normal(tokens, h, p, dtype=torch.float32)}
        arguments = (
            normal(tokens, h * p + dim + h),
            normal(SAMPLE_SLOTS, state_len, dim).transpose(1, 2),
            normal(SAMPLE_SLOTS, h, p, s, dtype=state_dtype),
            normal(dim, width - other, dtype=weights_dtype),
            None if other else normal(dim),
            -normal(h, dtype=torch.float32).exp(),
            normal(h, dtype=weights_dtype),
            normal(h, dtype=weights_dtype),
        )
        yield Sample(name, (*arguments, *plan, h, p, s, g, chunk_size // (1 + other)), options)
