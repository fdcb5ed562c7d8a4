"""kda_mixing: the convolution and Kimi Delta Attention of one layer, on decodes and prefills in one batch."""

from typing import NamedTuple

from torch import Tensor

from mamba_ops.ops._common.checking import check_tensors, shape_is, tensor_rank
from mamba_ops.ops._common.delta_rule import check_heads, check_lower_bound
from mamba_ops.ops._common.mixing import check_plan_and_caches
from mamba_ops.ops._common.narrow import meant
from mamba_ops.ops._common.sequences import PlanTensors
from mamba_ops.ops._common.values import check_mixing
from mamba_ops.ops._namespace import mamba


class Arguments(NamedTuple):
    """A call of kda_mixing: what its checks and its kernels get."""

    projected: Tensor
    a: Tensor
    b: Tensor
    conv_state: Tensor
    ssm_state: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    A_log: Tensor
    dt_bias: Tensor
    counts: Tensor | None
    cu_seqlens: Tensor | None
    prefill_cu_seqlens: Tensor | None
    slots: Tensor | None
    has_initial_state: Tensor | None
    num_computed_tokens: Tensor | None
    num_accepted_tokens: Tensor | None
    write_slots: Tensor | None
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    lower_bound: float | None
    null_slot: int
    state_scale: Tensor | None
    output: Tensor


@mamba.op(
    mutates=("conv_state", "ssm_state", "state_scale", "out"),
    splits_graph=True,
    reads_host=True,
    composed=True,
    reference="mamba_ops.ops.kda_mixing.reference:kda_mixing",
    arguments=Arguments,
    gradients_in="mamba_ops.layers.KimiDeltaAttention without caches",
)
def kda_mixing(
    projected: Tensor,
    a: Tensor,
    b: Tensor,
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
    num_computed_tokens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    write_slots: Tensor | None,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    *,
    lower_bound: float | None = None,
    null_slot: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Mix a batch of decodes and prefills: convolve, advance the states and write every token's output.

    The parts of the layer before it (projections) and after it (gated norm, projection) work on single tokens, so an
    engine cuts its graph here: the plan's tensors have fixed sizes, and the op reads its counts, not the graph. It is
    composed of causal_conv1d, chunk_kda, causal_conv1d_update and kda_update.

    Args:
        projected: `(tokens, 2 * keys + values)`, keys = num_k_heads * head_k_dim, values = num_v_heads * head_v_dim:
            all of q, all of k, all of v; tokens of decodes first, padding last.
        a: `(tokens, num_v_heads * head_k_dim)`, of which the decays are made.
        b: `(tokens, num_v_heads)`: sigmoid(b) is how much of a value is written.
        conv_state: cache `(slots, dim, state_len)`, dim = 2 * keys + values; state_len at least width - 1, and as many
            more as a speculative decode has tokens beyond its first. Mutated.
        ssm_state: cache `(slots, num_v_heads, head_v_dim, head_k_dim)`. Mutated.
        conv_weight: `(dim, width)`.
        conv_bias: `(dim,)` or None.
        A_log: `(num_v_heads,)`.
        dt_bias: `(num_v_heads, head_k_dim)`.
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, num_computed_tokens, num_accepted_tokens,
            write_slots: the plan, see `mamba_ops.serving.Plan` and `PlanTensors` there; all None: no plan.
        num_k_heads, num_v_heads, head_k_dim, head_v_dim: the layer's sizes on this rank.
        lower_bound: of the logs of decays, below 0; None: there is none. See kda_update.
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and no cache is touched.
        state_scale: float32 `(slots, num_v_heads, head_v_dim)`, with an ssm_state of int16 or
            float8_e4m3fn, and with no other: the scales of its rows, as in the op that decodes. Mutated. Prefills read
            and leave such states through float32, rounded to the nearest.
        out: `(tokens, num_v_heads, head_v_dim)`. Mutated. Zero for padding tokens; all zero without a plan or rows.

    q and k are normalised (see chunk_kda), the scale is head_k_dim ** -0.5.

    Raises:
        ValueError: before anything is written: shapes, dtypes, or counts that do not fit this batch.
    """


@kda_mixing.allocate_output
def _output(projected: Tensor, num_v_heads: int, head_v_dim: int) -> Tensor:
    return projected.new_empty(projected.shape[0], num_v_heads, head_v_dim)


@kda_mixing.validate
def _validate(call: Arguments) -> None:
    check_heads(call)
    check_lower_bound(call.lower_bound)
    keys, values = call.num_k_heads * call.head_k_dim, call.num_v_heads * call.head_v_dim
    tensor_rank("projected", call.projected, {2: "(tokens, size)"})
    tokens = call.projected.shape[0]
    hint = f"q and k of {call.num_k_heads} heads of {call.head_k_dim}, "
    hint += f"v of {call.num_v_heads} heads of {call.head_v_dim}"
    shape_is("projected", call.projected, (tokens, 2 * keys + values), hint=hint)
    shape_is("a", call.a, (tokens, call.num_v_heads * call.head_k_dim), hint="a number a head of v and channel of k")
    shape_is("b", call.b, (tokens, call.num_v_heads), hint="a number a head of v")
    check_tensors(call, "projected", indices=["ssm_state"], elsewhere=PlanTensors._fields)
    shape_is("A_log", call.A_log, (call.num_v_heads,))
    shape_is("dt_bias", call.dt_bias, (call.num_v_heads, call.head_k_dim))
    state = (call.num_v_heads, call.head_v_dim, call.head_k_dim)
    check_plan_and_caches(call, call.projected.device, {"conv_state": 2 * keys + values}, {"ssm_state": state})
    shape_is("out", call.output, (tokens, call.num_v_heads, call.head_v_dim))


@kda_mixing.meant
def _meant(ssm_state: Tensor, state_scale: Tensor | None) -> dict[str, tuple[Tensor, Tensor] | None]:
    return meant(ssm_state, state_scale)


@kda_mixing.validate_values
def _validate_values(call: Arguments) -> None:
    check_mixing("mamba_ops::kda_mixing", call, call.projected)
