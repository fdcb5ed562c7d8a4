"""short_conv_mixing: the gated short convolution of one layer, on decodes and prefills in one batch."""

from typing import NamedTuple

from torch import Tensor

from mamba_ops.ops._common.checking import check_tensors, shape_is, tensor_rank
from mamba_ops.ops._common.mixing import check_plan_and_caches
from mamba_ops.ops._common.sequences import PlanTensors
from mamba_ops.ops._common.values import check_mixing
from mamba_ops.ops._namespace import mamba
from mamba_ops.registry import bad_argument


class Arguments(NamedTuple):
    """A call of short_conv_mixing: what its checks and its kernels get."""

    projected: Tensor
    conv_state: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    counts: Tensor | None
    cu_seqlens: Tensor | None
    prefill_cu_seqlens: Tensor | None
    slots: Tensor | None
    has_initial_state: Tensor | None
    num_computed_tokens: Tensor | None
    num_accepted_tokens: Tensor | None
    write_slots: Tensor | None
    null_slot: int
    output: Tensor


@mamba.op(
    mutates=("conv_state", "out"),
    splits_graph=True,
    reads_host=True,
    composed=True,
    reference="mamba_ops.ops.short_conv_mixing.reference:short_conv_mixing",
    arguments=Arguments,
    gradients_in="mamba_ops.layers.ShortConv without caches",
)
def short_conv_mixing(
    projected: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    prefill_cu_seqlens: Tensor | None,
    slots: Tensor | None,
    has_initial_state: Tensor | None,
    num_computed_tokens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    write_slots: Tensor | None,
    *,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Mix a batch of decodes and prefills: gate, convolve without an activation, gate again, and write every output.

    The parts of the layer before it and after it (two projections) work on single tokens, so an engine cuts its graph
    here: the plan's tensors have fixed sizes, and the op reads its counts, not the graph. It is composed of
    causal_conv1d and causal_conv1d_update.

    Args:
        projected: `(tokens, 3 * dim)`: B, C, x; tokens of decodes first, padding last.
        conv_state: cache `(slots, dim, state_len)` of B * x; state_len at least width - 1, and as many more as a
            speculative decode has tokens beyond its first. Mutated.
        conv_weight: `(dim, width)`, width 2 to 8, oldest tap first.
        conv_bias: `(dim,)` or None.
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, num_computed_tokens, num_accepted_tokens,
            write_slots: the plan, see `mamba_ops.serving.Plan` and `PlanTensors` there; all None: no plan.
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and no cache is touched.
        out: `(tokens, dim)`. Mutated. Zero for padding tokens; all zero without a plan or rows.

    For each token t of a sequence, with B * x and the convolution's result y each rounded to the dtype of `projected`:

        y[t] = conv_bias + sum_j conv_weight[:, j] * (B * x)[t - width + 1 + j]        j = 0 .. width - 1
        out[t] = C[t] * y[t]; 0 where y[t] is 0, whatever C[t] is

    Raises:
        ValueError: before anything is written: shapes, dtypes, or counts that do not fit this batch.
    """


@short_conv_mixing.allocate_output
def _output(projected: Tensor) -> Tensor:
    return projected.new_empty(projected.shape[0], projected.shape[-1] // 3)


@short_conv_mixing.validate
def _validate(call: Arguments) -> None:
    tensor_rank("projected", call.projected, {2: "(tokens, 3 * dim)"})
    tokens, size = call.projected.shape
    if not size or size % 3:
        hint = "B, C and x of every channel"
        raise bad_argument("projected", got=f"shape {(tokens, size)}", expected="(tokens, 3 * dim)", hint=hint)
    check_tensors(call, "projected", elsewhere=PlanTensors._fields)
    check_plan_and_caches(call, call.projected.device, {"conv_state": size // 3}, {})
    shape_is("out", call.output, (tokens, size // 3))


@short_conv_mixing.validate_values
def _validate_values(call: Arguments) -> None:
    check_mixing("mamba_ops::short_conv_mixing", call, call.projected, states=())
