"""gdn_mixing: the convolution and the gated delta rule of one layer, on decodes and prefills in one batch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._namespace import mamba
from mamba_ops.ops.causal_conv1d import causal_conv1d
from mamba_ops.ops.causal_conv1d_update import causal_conv1d_update
from mamba_ops.ops.checking import floating, one_device, shape_is, tensor_rank
from mamba_ops.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from mamba_ops.ops.gated_delta_rule_update import delta_rule_gates, gated_delta_rule_update
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
from mamba_ops.registry import Sample, bad_argument, given


@mamba.op(mutates=("conv_state", "ssm_state", "z", "out"), splits_graph=True, reads_host=True, composed=True)
def gdn_mixing(
    projected_qkvz: Tensor,
    projected_ba: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    prefill_cu_seqlens: Tensor | None,
    slots: Tensor | None,
    has_initial_state: Tensor | None,
    computed_tokens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    interleaved: bool,
    *,
    z: Tensor | None = None,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Mix a batch of decodes and prefills: convolve, advance the states, write every token's output and its gate.

    What stands before it in the layer (two projections) and behind it (gated norm, projection) works on tokens alone,
    so an engine cuts its graph here: the plan's tensors have fixed sizes and its counts are read by the op, not by the
    graph. It is composed of causal_conv1d, chunk_gated_delta_rule, causal_conv1d_update and gated_delta_rule_update.

    Args:
        projected_qkvz: `(tokens, 2 * keys + 2 * values)`, keys = num_k_heads * head_k_dim, values = num_v_heads *
            head_v_dim: q, k, v and gate; tokens of decodes first, padding last.
        projected_ba: `(tokens, 2 * num_v_heads)`: b, of which sigmoid(b) of a value is written, and a, for the decay.
        conv_state: cache `(slots, dim, state_len)`, dim = 2 * keys + values: all of q, all of k, all of v; state_len at
            least width - 1, and as many more as a speculative decode has tokens beyond its first. Mutated.
        ssm_state: cache `(slots, num_v_heads, head_v_dim, head_k_dim)`. Mutated.
        conv_weight: `(dim, width)`.
        conv_bias: `(dim,)` or None.
        A_log: `(num_v_heads,)`.
        dt_bias: `(num_v_heads,)`.
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, computed_tokens, num_accepted_tokens: the
            plan, see `mamba_ops.ops.mixing.PlanTensors` and `mamba_ops.serving.Plan`; all None: no plan.
        num_k_heads, num_v_heads, head_k_dim, head_v_dim: the layer's sizes on this rank.
        interleaved: whether the projections hold one head of k after the other, with its q, k, v, gate and its b, a (as
            Qwen3-Next's do), or all of q, then all of k, v, gate, and all of b, then a (as Qwen3.5's do).
        z: `(tokens, num_v_heads, head_v_dim)`: becomes the gate, zero for tokens that no row has. Mutated. None: it is
            not wanted.
        null_slot: a row whose slot is this or negative is nobody: its output is zero, no cache is touched.
        out: like `z`. Mutated. Zero for tokens that no row has; all zero without a plan or rows.

    q and k are normalised (see chunk_gated_delta_rule), the scale is head_k_dim ** -0.5.

    Raises:
        ValueError: before anything is written: shapes, dtypes, or counts that are not this batch's.
    """
    output = given(out)
    plan = PlanTensors(
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, computed_tokens, num_accepted_tokens
    )
    batch = batch_of(gdn_mixing.qualname, plan, projected_qkvz.shape[0], null_slot)
    require_window(gdn_mixing.qualname, plan, conv_state, conv_weight)
    sizes = (num_k_heads, num_v_heads, head_k_dim, head_v_dim)
    here = slice(0, batch.tokens)
    mixed, gate, b, a = unpack(projected_qkvz[here], projected_ba[here], *sizes, interleaved)
    by_key = (num_k_heads, head_k_dim)
    heads = by_key, by_key, (num_v_heads, head_v_dim)

    def read(rows: Rows, convolve: Call, scan: Call) -> None:
        convolved = convolve(rows.of(mixed), conv_weight, conv_bias, conv_state=conv_state, **rows.options)
        q, k, v = by_head(like_convolved(rows.of(mixed)) if convolved is None else convolved, *heads)
        g, beta = delta_rule_gates(rows.of(a), rows.of(b), A_log, dt_bias)
        scan(q, k, v, g, beta, state=ssm_state, qk_l2norm=True, out=rows.of(output), **rows.options)

    def step(rows: Rows, convolve: Call, update: Call) -> None:
        convolved = convolve(rows.of(mixed), conv_state, conv_weight, conv_bias, **rows.options)
        q, k, v = by_head(like_convolved(rows.of(mixed)) if convolved is None else convolved, *heads)
        gates = {"a": rows.of(a), "b": rows.of(b), "A_log": A_log, "dt_bias": dt_bias}
        update(ssm_state, q, k, v, **gates, qk_l2norm=True, out=rows.of(output), **rows.options)

    each_kind(
        batch, step, (causal_conv1d_update, gated_delta_rule_update), read, (causal_conv1d, chunk_gated_delta_rule)
    )
    batch.clear_rest(output)
    if z is not None:
        z[here].copy_(gate)
        batch.clear_rest(z)
    return output


def unpack(
    qkvz: Tensor,
    ba: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what is convolved (all q, all k, all v), the gate by head, b and a. Views, but for what is interleaved.

    Args:
        qkvz, ba: the two projections, `(..., 2 * keys + 2 * values)` and `(..., 2 * num_v_heads)`.
        num_k_heads, num_v_heads, head_k_dim, head_v_dim, interleaved: as for `gdn_mixing`.
    """
    if not interleaved:
        dim, values = 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim, num_v_heads * head_v_dim
        mixed, z = qkvz.split([dim, values], dim=-1)
        b, a = ba.chunk(2, dim=-1)
        return mixed, z.unflatten(-1, (num_v_heads, head_v_dim)), b, a
    of_one = num_v_heads // num_k_heads
    parts = [head_k_dim, head_k_dim, of_one * head_v_dim, of_one * head_v_dim]
    q, k, v, z = qkvz.unflatten(-1, (num_k_heads, sum(parts))).split(parts, dim=-1)
    b, a = ba.unflatten(-1, (num_k_heads, 2 * of_one)).chunk(2, dim=-1)
    mixed = torch.cat([q.flatten(-2), k.flatten(-2), v.flatten(-2)], dim=-1)
    return mixed, z.reshape(*z.shape[:-2], num_v_heads, head_v_dim), b.flatten(-2), a.flatten(-2)


@gdn_mixing.checks
def _checks(
    projected_qkvz: Tensor,
    projected_ba: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    prefill_cu_seqlens: Tensor | None,
    slots: Tensor | None,
    has_initial_state: Tensor | None,
    computed_tokens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    z: Tensor | None,
    output: Tensor,
) -> None:
    for name, value in (("num_k_heads", num_k_heads), ("head_k_dim", head_k_dim), ("head_v_dim", head_v_dim)):
        if value < 1:
            raise bad_argument(name, got=value, expected="a positive number")
    if num_v_heads < 1 or num_v_heads % num_k_heads:
        expected = f"a multiple of the {num_k_heads} heads of k"
        raise bad_argument("num_v_heads", got=num_v_heads, expected=expected)
    keys, values = num_k_heads * head_k_dim, num_v_heads * head_v_dim
    tensor_rank("projected_qkvz", projected_qkvz, {2: "(tokens, size)"})
    tokens = projected_qkvz.shape[0]
    hint = f"q and k of {num_k_heads} heads of {head_k_dim}, v and gate of {num_v_heads} heads of {head_v_dim}"
    shape_is("projected_qkvz", projected_qkvz, (tokens, 2 * keys + 2 * values), hint=hint)
    shape_is("projected_ba", projected_ba, (tokens, 2 * num_v_heads), hint="b and a of every head of v")
    tensors = {"conv_weight": conv_weight, "conv_bias": conv_bias, "A_log": A_log, "dt_bias": dt_bias}
    tensors |= {"projected_ba": projected_ba, "conv_state": conv_state, "ssm_state": ssm_state, "z": z}
    floating(projected_qkvz=projected_qkvz, **tensors, out=output)
    one_device(projected_qkvz.device, "projected_qkvz", **tensors, out=output)
    shape_is("A_log", A_log, (num_v_heads,))
    shape_is("dt_bias", dt_bias, (num_v_heads,))
    plan = PlanTensors(
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, computed_tokens, num_accepted_tokens
    )
    check_plan(projected_qkvz.device, plan)
    dim = 2 * keys + values
    check_caches(plan, conv_state, ssm_state, conv_weight, conv_bias, dim, (num_v_heads, head_v_dim, head_k_dim))
    shape_is("z", z, (tokens, num_v_heads, head_v_dim))
    shape_is("out", output, (tokens, num_v_heads, head_v_dim))


@gdn_mixing.outputs
def _output(projected_qkvz: Tensor, num_v_heads: int, head_v_dim: int) -> Tensor:
    return projected_qkvz.new_empty(projected_qkvz.shape[0], num_v_heads, head_v_dim)


@gdn_mixing.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    num_k_heads: int = 2,
    num_v_heads: int = 4,
    head_k_dim: int = 8,
    head_v_dim: int = 12,
    width: int = 4,
) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for name, tokens, plan, null_slot in sample_plans(device):
        other = name == "prefills"  # there every argument that can be another is
        interleaved = name not in ("prefills", "decodes", "speculative")
        K, V, k_dim, v_dim = num_k_heads, num_v_heads, head_k_dim, head_v_dim
        if other:
            K, V, k_dim, v_dim = V, 2 * V, v_dim, k_dim
        weights_dtype = torch.float32 if other else dtype
        dim = 2 * K * k_dim + V * v_dim
        state_len = width - 1 + (2 if plan.num_accepted_tokens is not None else 0)
        options: dict[str, Any] = {"null_slot": null_slot}
        if name in ("padded", "decodes", "no plan"):
            options |= {"z": normal(tokens, V, v_dim), "out": normal(tokens, V, v_dim, dtype=torch.float32)}
        arguments = (
            normal(tokens, dim + V * v_dim),
            normal(tokens, 2 * V),
            normal(SAMPLE_SLOTS, state_len, dim).transpose(1, 2),
            normal(SAMPLE_SLOTS, V, v_dim, k_dim, dtype=state_dtype),
            normal(dim, width - other, dtype=weights_dtype),
            normal(dim) if other else None,
            normal(V, dtype=torch.float32),
            normal(V, dtype=weights_dtype),
        )
        yield Sample(name, (*arguments, *plan, K, V, k_dim, v_dim, interleaved), options)
