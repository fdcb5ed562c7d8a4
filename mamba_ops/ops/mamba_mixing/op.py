"""mamba_mixing: the convolution and the recurrence of one Mamba-1 layer, on decodes and prefills in one batch."""

from typing import NamedTuple

from torch import Tensor

from mamba_ops.ops._common.checking import check_tensors, shape_is, short, tensor_rank
from mamba_ops.ops._common.mixing import check_plan_and_caches
from mamba_ops.ops._common.narrow import meant
from mamba_ops.ops._common.sequences import PlanTensors
from mamba_ops.ops._common.values import check_mixing
from mamba_ops.ops._namespace import mamba
from mamba_ops.registry import bad_argument


class Arguments(NamedTuple):
    """A call of mamba_mixing: what its checks and its kernels get."""

    projected: Tensor
    conv_state: Tensor
    ssm_state: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    dt_proj_bias: Tensor
    A: Tensor
    D: Tensor
    dt_norm_weight: Tensor | None
    B_norm_weight: Tensor | None
    C_norm_weight: Tensor | None
    counts: Tensor | None
    cu_seqlens: Tensor | None
    prefill_cu_seqlens: Tensor | None
    slots: Tensor | None
    has_initial_state: Tensor | None
    num_computed_tokens: Tensor | None
    num_accepted_tokens: Tensor | None
    write_slots: Tensor | None
    norm_eps: float
    null_slot: int
    state_scale: Tensor | None
    output: Tensor


@mamba.op(
    mutates=("conv_state", "ssm_state", "state_scale", "out"),
    splits_graph=True,
    reads_host=True,
    composed=True,
    reference="mamba_ops.ops.mamba_mixing.reference:mamba_mixing",
    arguments=Arguments,
    gradients_in="mamba_ops.layers.Mamba without caches",
)
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
    num_computed_tokens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    write_slots: Tensor | None,
    *,
    norm_eps: float = 1e-6,
    null_slot: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Mix a batch of decodes and prefills: convolve, project to dt, B and C, advance the states, write gated outputs.

    In Mamba-1 step sizes, B and C are computed from the convolution's output, so their two projections are inside. The
    parts of the layer before and after it work on single tokens; an engine cuts its graph here: the plan's tensors have
    fixed sizes, and the op reads its counts, not the graph. It is composed of causal_conv1d, selective_scan,
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
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, num_computed_tokens, num_accepted_tokens,
            write_slots: the plan, see `mamba_ops.serving.Plan` and `PlanTensors` there; all None: no plan.
        norm_eps: added to the norms' mean squares.
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and no cache is touched.
        state_scale: float32 `(slots, inner)`, with an ssm_state of int16 or
            float8_e4m3fn, and with no other: the scales of its rows, as in the op that decodes. Mutated. Prefills read
            and leave such states through float32, rounded to the nearest.
        out: `(tokens, inner)`. Mutated. Zero for padding tokens; all zero without a plan or rows.

    Rows share two matrix products. Their last bits may change with the number of tokens; apart from that rows are
    independent.

    Raises:
        ValueError: before anything is written: shapes, dtypes, or counts that do not fit this batch.
    """


mamba_mixing.by_rows = True  # its scan


@mamba_mixing.allocate_output
def _output(projected: Tensor) -> Tensor:
    return projected.new_empty(projected.shape[0], projected.shape[-1] // 2)


@mamba_mixing.validate
def _validate(call: Arguments) -> None:
    tensor_rank("A", call.A, {2: "(inner, dstate)"})
    tensor_rank("dt_proj_weight", call.dt_proj_weight, {2: "(inner, dt_rank)"})
    (inner, dstate), rank = call.A.shape, call.dt_proj_weight.shape[1]
    if not inner or not dstate:
        raise bad_argument("A", got=f"shape {tuple(call.A.shape)}", expected="(inner, dstate), neither of them 0")
    tensor_rank("projected", call.projected, {2: "(tokens, size)"})
    shape_is("projected", call.projected, (call.projected.shape[0], 2 * inner), hint=f"x and gate of {inner} channels")
    check_tensors(call, "projected", indices=["ssm_state"], elsewhere=PlanTensors._fields)
    shape_is("x_proj_weight", call.x_proj_weight, (rank + 2 * dstate, inner), hint="to dt, B and C")
    shape_is("dt_proj_weight", call.dt_proj_weight, (inner, rank))
    for name in ("x_proj_weight", "dt_proj_weight"):
        if (weight := getattr(call, name)).dtype != call.projected.dtype:
            got, expected = short(weight.dtype), short(call.projected.dtype)
            raise bad_argument(name, got=got, expected=f"{expected}, as projected", hint="convert it once, beforehand")
    for name in ("dt_proj_bias", "D"):
        shape_is(name, getattr(call, name), (inner,))
    shape_is("dt_norm_weight", call.dt_norm_weight, (rank,))
    for name in ("B_norm_weight", "C_norm_weight"):
        shape_is(name, getattr(call, name), (dstate,))
    check_plan_and_caches(call, call.projected.device, {"conv_state": inner}, {"ssm_state": (inner, dstate)})
    shape_is("out", call.output, (call.projected.shape[0], inner))


@mamba_mixing.meant
def _meant(ssm_state: Tensor, state_scale: Tensor | None) -> dict[str, tuple[Tensor, Tensor] | None]:
    return meant(ssm_state, state_scale)


@mamba_mixing.validate_values
def _validate_values(call: Arguments) -> None:
    check_mixing("mamba_ops::mamba_mixing", call, call.projected)
