"""mamba3_mixing: Mamba-3's recurrence of one layer, on decodes and prefills in one batch."""

from typing import NamedTuple

from torch import Tensor

from mamba_ops.ops._common.checking import check_chunk_size, check_tensors, tensor_rank
from mamba_ops.ops._common.mamba3_checks import CACHES, cache_sizes, check_tokens, output_shape
from mamba_ops.ops._common.mixing import check_plan_and_caches
from mamba_ops.ops._common.sequences import PlanTensors
from mamba_ops.ops._common.values import check_mixing
from mamba_ops.ops._namespace import mamba


class Arguments(NamedTuple):
    """A call of mamba3_mixing: what its checks and its kernels get."""

    x: Tensor
    dt: Tensor
    A: Tensor
    trap: Tensor
    angles: Tensor
    B: Tensor
    C: Tensor
    angle_state: Tensor
    ssm_state: Tensor
    k_state: Tensor
    v_state: Tensor
    counts: Tensor | None
    cu_seqlens: Tensor | None
    prefill_cu_seqlens: Tensor | None
    slots: Tensor | None
    has_initial_state: Tensor | None
    num_computed_tokens: Tensor | None
    num_accepted_tokens: Tensor | None
    write_slots: Tensor | None
    chunk_size: int
    B_bias: Tensor | None
    C_bias: Tensor | None
    D: Tensor | None
    z: Tensor | None
    mimo_x: Tensor | None
    mimo_z: Tensor | None
    mimo_o: Tensor | None
    null_slot: int
    output: Tensor


@mamba.op(
    mutates=("angle_state", "ssm_state", "k_state", "v_state", "out"),
    splits_graph=True,
    reads_host=True,
    composed=True,
    reference="mamba_ops.ops.mamba3_mixing.reference:mamba3_mixing",
    arguments=Arguments,
    gradients_in="mamba_ops.layers.Mamba3 without caches",
)
def mamba3_mixing(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    angles: Tensor,
    B: Tensor,
    C: Tensor,
    angle_state: Tensor,
    ssm_state: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    prefill_cu_seqlens: Tensor | None,
    slots: Tensor | None,
    has_initial_state: Tensor | None,
    num_computed_tokens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    write_slots: Tensor | None,
    chunk_size: int,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Mix a batch of decodes and prefills: advance the states and write every token's output.

    The parts of the layer before it (projection, norms of B and C, step sizes) and after it (norm, projection) work on
    single tokens, so an engine cuts its graph here: the plan's tensors have fixed sizes, and the op reads its counts,
    not the graph. It is composed of mamba3_chunk_scan and mamba3_state_update, which say what is computed.

    Args:
        x: `(tokens, heads, dim)`; tokens of decodes first, padding last.
        dt: `(tokens, heads)`, the step sizes; positive.
        A: `(tokens, heads)`, the rates; negative.
        trap: `(tokens, heads)`.
        angles: `(tokens, angles)`, raw.
        B, C: `(tokens, groups, dstate)`. MIMO: `(tokens, rank, groups, dstate)`.
        angle_state: cache `(slots, heads, angles)`. Mutated.
        ssm_state: cache `(slots, heads, dim, dstate)`. Mutated.
        k_state: cache `(slots, heads, dstate)`. Mutated. MIMO: `(slots, rank, heads, dstate)`.
        v_state: cache `(slots, heads, dim)`. Mutated.
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, num_computed_tokens, num_accepted_tokens,
            write_slots: the plan, see `mamba_ops.serving.Plan` and `PlanTensors` there; all None: no plan.
        chunk_size: tokens of a chunk of the prefills' scan, 1 to 4096.
        B_bias, C_bias: `(heads, dstate)`. MIMO: `(heads, rank, dstate)`.
        D: skip weight, `(heads,)`.
        z: gate, like x.
        mimo_x, mimo_z, mimo_o: `(heads, rank, dim)`, as mamba3_chunk_scan has them. None: SISO.
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and no cache is touched.
        out: like x; MIMO without mimo_o: `(tokens, rank, heads, dim)`. Mutated. Zero for padding tokens; all zero
            without a plan or rows.

    k and q of prefills are rounded to the dtype that x, B and C promote to, those of decodes are not.

    Raises:
        ValueError: before anything is written: shapes, dtypes, or counts that do not fit this batch.
    """


@mamba3_mixing.allocate_output
def _output(x: Tensor, mimo_x: Tensor | None, mimo_o: Tensor | None) -> Tensor:
    return x.new_empty(output_shape(x, mimo_x, mimo_o))


@mamba3_mixing.validate
def _validate(call: Arguments) -> None:
    check_tensors(call, "x", elsewhere=PlanTensors._fields)
    check_chunk_size(call.chunk_size)
    tensor_rank("x", call.x, {3: "(tokens, heads, dim)"})
    check_tokens(call)
    sizes = cache_sizes(call)
    check_plan_and_caches(call, call.x.device, {}, {name: sizes[name] for name in CACHES}, of="x")


@mamba3_mixing.validate_values
def _validate_values(call: Arguments) -> None:
    check_mixing("mamba_ops::mamba3_mixing", call, call.x, windows=(), states=("ssm_state",))
