"""mamba2_mixing: the convolution and the recurrence of one Mamba-2 layer, on decodes and prefills in one batch."""

import math
from typing import NamedTuple

from torch import Tensor

from mamba_ops.ops._common.checking import check_chunk_size, check_limits, check_tensors, shape_is, tensor_rank
from mamba_ops.ops._common.mixing import check_plan_and_caches
from mamba_ops.ops._common.narrow import meant
from mamba_ops.ops._common.sequences import PlanTensors
from mamba_ops.ops._common.values import check_mixing
from mamba_ops.ops._namespace import mamba
from mamba_ops.registry import bad_argument


class Arguments(NamedTuple):
    """A call of mamba2_mixing: what its checks and its kernels get."""

    projected: Tensor
    conv_state: Tensor
    ssm_state: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    counts: Tensor | None
    cu_seqlens: Tensor | None
    prefill_cu_seqlens: Tensor | None
    slots: Tensor | None
    has_initial_state: Tensor | None
    num_computed_tokens: Tensor | None
    num_accepted_tokens: Tensor | None
    write_slots: Tensor | None
    heads: int
    head_dim: int
    dstate: int
    groups: int
    chunk_size: int
    dt_min: float
    dt_max: float
    null_slot: int
    state_scale: Tensor | None
    output: Tensor


@mamba.op(
    mutates=("conv_state", "ssm_state", "state_scale", "out"),
    splits_graph=True,
    reads_host=True,
    composed=True,
    reference="mamba_ops.ops.mamba2_mixing.reference:mamba2_mixing",
    arguments=Arguments,
    gradients_in="mamba_ops.layers.Mamba2 without caches",
)
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
    num_computed_tokens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    write_slots: Tensor | None,
    heads: int,
    head_dim: int,
    dstate: int,
    groups: int,
    chunk_size: int,
    *,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    null_slot: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Mix a batch of decodes and prefills: convolve, advance the states, and write every token's output.

    The parts of the layer before it (the projection) and after it (gated norm, projection) work on single tokens, so an
    engine cuts its graph here: the plan's tensors have fixed sizes, and the op reads its counts, not the graph. It is
    composed of causal_conv1d, mamba_chunk_scan, causal_conv1d_update and selective_state_update.

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
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, num_computed_tokens, num_accepted_tokens,
            write_slots: the plan, see `mamba_ops.serving.Plan` and `PlanTensors` there; all None: no plan.
        heads, head_dim, dstate, groups: the layer's sizes on this rank.
        chunk_size: tokens of a chunk in prefills, 1 to 4096; they end at multiples of it from a request's first token.
        dt_min, dt_max: limits of the step sizes after their softplus.
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and no cache is touched.
        state_scale: float32 `(slots, heads, head_dim)`, with an ssm_state of int16 or
            float8_e4m3fn, and with no other: the scales of its rows, as in the op that decodes. Mutated. Prefills read
            and leave such states through float32, rounded to the nearest.
        out: `(tokens, heads, head_dim)`. Mutated. Zero for padding tokens; all zero without a plan or rows.

    Raises:
        ValueError: before anything is written: shapes, dtypes, or counts that do not fit this batch.
    """


@mamba2_mixing.allocate_output
def _output(projected: Tensor, heads: int, head_dim: int) -> Tensor:
    return projected.new_empty(projected.shape[0], heads, head_dim)


@mamba2_mixing.validate
def _validate(call: Arguments) -> None:
    check_chunk_size(call.chunk_size)
    check_limits(call.dt_min, call.dt_max)
    for name in ("heads", "head_dim", "dstate"):
        if (value := getattr(call, name)) < 1:
            raise bad_argument(name, got=value, expected="a positive number")
    if call.groups < 1 or call.heads % call.groups:
        raise bad_argument("groups", got=call.groups, expected=f"a divisor of the {call.heads} heads")
    if not call.dt_min <= call.dt_max:
        raise bad_argument("dt_min", got=call.dt_min, expected=f"at most dt_max, which is {call.dt_max}")
    inner, dim = call.heads * call.head_dim, call.heads * call.head_dim + 2 * call.groups * call.dstate
    tensor_rank("projected", call.projected, {2: "(tokens, size)"})
    hint = f"gate, x, B, C and dt of {call.heads} heads of {call.head_dim} and {call.groups} groups of {call.dstate}"
    shape_is("projected", call.projected, (call.projected.shape[0], inner + dim + call.heads), hint=hint)
    check_tensors(call, "projected", indices=["ssm_state"], elsewhere=PlanTensors._fields)
    for name in ("A", "D", "dt_bias"):
        shape_is(name, getattr(call, name), (call.heads,))
    state = (call.heads, call.head_dim, call.dstate)
    check_plan_and_caches(call, call.projected.device, {"conv_state": dim}, {"ssm_state": state})
    shape_is("out", call.output, (call.projected.shape[0], call.heads, call.head_dim))


@mamba2_mixing.meant
def _meant(ssm_state: Tensor, state_scale: Tensor | None) -> dict[str, tuple[Tensor, Tensor] | None]:
    return meant(ssm_state, state_scale)


@mamba2_mixing.validate_values
def _validate_values(call: Arguments) -> None:
    check_mixing("mamba_ops::mamba2_mixing", call, call.projected)
