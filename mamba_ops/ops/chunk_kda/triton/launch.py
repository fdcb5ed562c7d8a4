"""How the four kernels of chunk_kda are launched."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ops.ops._triton.common import cdiv, on_device_of, operand_dtype, or_placeholder, slots_of
from mamba_ops.ops._triton.delta_rule import CHUNK, precisions_of
from mamba_ops.ops._triton.gluon import is_hopper_walk, launch_walk
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch
from mamba_ops.ops._triton.layout import by_token, dense, is_dense, write_back
from mamba_ops.ops._triton.limits import Limits
from mamba_ops.ops.chunk_kda.triton.kernels import _scan, _solve
from mamba_ops.ops.chunk_kda.triton.pairs import _decay, _steep_pairs

if TYPE_CHECKING:
    from mamba_ops.ops.chunk_kda.op import Arguments

_TOGETHER = 4  # chunks and heads that a program looks through for steep decays


def chunk_kda(call: "Arguments") -> None:
    """Write `output` and the last states; shapes and meaning are the op's, and are not checked again.

    What matrix units are given is rounded to the dtype of q, k and v: the state before a chunk, what its tokens
    write and what they find missing, the inverse of its system, queries and keys with their decays, how much queries
    read of what each token writes, and the product of that and the inverse; of logs of decays two parts are given.
    float32 stays float32, which is slow. Every token of an activation must be dense: others are copied first, and an
    output that is not is written through a copy. Where a token of q, k, v, g or output or a slot of the state does not
    start at a multiple of 16 bytes, or a slot is not dense, reads are narrow and slow.
    """
    flat = call.cu_seqlens is not None
    rows = call.v.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    length = call.v.shape[0] if flat else call.v.shape[1]
    (k_heads, k_dim), (v_heads, v_dim) = call.q.shape[-2:], call.v.shape[-2:]
    tokens = call.v.numel() // (v_heads * v_dim)
    moves = call.write_slots is not None and call.ssm_state is not None
    if rows == 0 or (tokens == 0 and not moves):
        return
    chunks = tokens // CHUNK + rows if flat else rows * cdiv(length, CHUNK)

    written = by_token(call.output, flat)
    q, k, v, g, beta = (by_token(t, flat) for t in (call.q, call.k, call.v, call.g, call.beta))
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.contiguous()
    slots, write_slots = (None if t is None else dense(t) for t in (call.slots, call.write_slots))
    operand = operand_dtype(q, k, v)

    block_k, v_padded = (max(triton.next_power_of_2(size), 16) for size in (k_dim, v_dim))

    def scratch(*shape: int, dtype: torch.dtype = operand) -> Tensor:
        return torch.empty((chunks, v_heads, *shape), dtype=dtype, device=v.device)

    of_chunks = Chunks.empty(scratch, block_k, keeps=False)
    places = 0
    for tensor in (q, k, v, g, written):
        places |= tensor.data_ptr() | tensor.stride(0) * tensor.itemsize | tensor.shape[-1] * tensor.itemsize
    slots, slots_stride = or_placeholder(slots, v, tl.int32)
    has_initial_state, initial_stride = or_placeholder(
        None if call.ssm_state is None else call.has_initial_state, v, tl.int1
    )
    write_slots, write_stride = or_placeholder(write_slots, v, tl.int32)
    slot_stride, *strides = (-1, 0, 0, 0) if call.ssm_state is None else call.ssm_state.stride()
    if call.ssm_state is not None:
        places |= call.ssm_state.data_ptr() | slot_stride * call.ssm_state.itemsize
    aligned = places % 16 == 0 and (call.ssm_state is None or is_dense(call.ssm_state))
    head_stride, value_stride, key_stride = (None, None, None) if aligned else strides
    ssm_state, _ = or_placeholder(call.ssm_state, v, tl.float32)

    of_keys = {"V_HEADS": v_heads, "K_DIM": k_dim, "ALIGNED": aligned, "CHUNK": CHUNK, "BLOCK_K": block_k}
    of_values = {**of_keys, "V_DIM": v_dim, "V_PADDED": v_padded}
    launches = _launches(v.get_device(), k_dim, v_dim, str(operand).removeprefix("torch."))
    with on_device_of(v):
        if tokens:
            of_chunks.find(
                (q, k, g, beta),
                (cu_seqlens, slots),
                (slots_stride, length, rows, call.null_slot, slots_of(call.ssm_state)),
                {**of_keys, "K_HEADS": k_heads},
                launches,
                scale=k_dim**-0.5 if call.scale is None else float(call.scale),
                l2norm=call.qk_l2norm,
            )
        inputs = (v, cu_seqlens, ssm_state, slots, write_slots, has_initial_state, written)
        of_tokens = (v.stride(0), written.stride(0))
        of_rows = (slots_stride, write_stride, initial_stride, slot_stride)
        ends = (length, call.null_slot, slots_of(call.ssm_state))
        if is_hopper_walk(q, k, v, written, aligned=aligned):
            tensors = (None, None, *inputs, of_chunks.whole, of_chunks.keyed, of_chunks.solved)
            numbers = (None, None, *of_tokens, *of_rows, *ends)
            launch_walk(rows * v_heads, tensors, numbers, K_HEADS=k_heads, V_HEADS=v_heads, STAGES=2)
        else:
            _scan[(rows * v_heads * (v_padded // launches["_scan"]["BLOCK"]),)](
                *inputs,
                *(of_chunks.keyed, of_chunks.whole, of_chunks.solved, None, None),
                *(*of_tokens, *of_rows, head_stride, value_stride, key_stride, *ends),
                **of_values,
                **launches["_scan"],
            )
    write_back(written, call.output, flat)


class Chunks(NamedTuple):
    """What is found of all chunks at once, (chunks, v_heads, ...); `_decay` and `_solve` say what it is."""

    factors: Tensor
    steep: Tensor
    keyed: Tensor
    whole: Tensor
    system: Tensor
    solved: Tensor
    weights: Tensor | None
    inverses: Tensor | None

    @classmethod
    def empty(cls, scratch: Callable[..., Tensor], block_k: int, *, keeps: bool) -> "Chunks":
        """Return it before it is found.

        Args:
            scratch: makes a tensor of such a shape, of the operands' dtype by default.
            block_k: of a key's channels, padded.
            keeps: what a backward pass reads, too.
        """
        return cls(
            factors=scratch(2, CHUNK, dtype=torch.float32),
            steep=scratch(dtype=torch.int32),
            keyed=scratch(4, CHUNK, block_k),
            whole=scratch(block_k, dtype=torch.float32),
            system=scratch(CHUNK, CHUNK, dtype=torch.float32),
            solved=scratch(2 * CHUNK, CHUNK),
            weights=scratch(CHUNK, CHUNK) if keeps else None,
            inverses=scratch(CHUNK, CHUNK) if keeps else None,
        )

    def find(
        self,
        tokens: tuple[Tensor, Tensor, Tensor, Tensor],
        rows: tuple[Tensor | None, Tensor | None],
        numbers: tuple[int | None, ...],
        sizes: dict[str, Any],
        launches: Launches,
        *,
        scale: float,
        l2norm: bool,
    ) -> None:
        """Launch all kernels but `_scan`.

        Args:
            tokens: q, k, g and beta.
            rows: cu_seqlens and slots.
            numbers: those that the kernels have from `slots_stride` on.
            sizes: of a key, and how it lies in memory: what `_decay` and `_steep_pairs` are compiled for.
            launches: of these kernels.
            scale: of queries.
            l2norm: whether heads of q and k are divided by their lengths.
        """
        q, k, g, beta = tokens
        cu_seqlens, slots = rows
        count, strides = self.steep.numel(), (q.stride(0), k.stride(0), g.stride(0))
        _decay[(count,)](
            *(q, k, g, cu_seqlens, slots, self.factors, self.steep, self.keyed, self.whole, scale, *strides, *numbers),
            **sizes,
            L2NORM=l2norm,
            **launches["_decay"],
        )
        _steep_pairs[(cdiv(count, _TOGETHER),)](
            *(q, k, g, cu_seqlens, self.factors, self.steep, self.system, *strides, *numbers[1:3], count),
            **{name: size for name, size in sizes.items() if name != "BLOCK_K"},
            **{name: launches["_decay"][name] for name in ("BLOCK", "BLOCK_ROWS", "SPAN")},
            TOGETHER=_TOGETHER,
            **launches["_steep_pairs"],
        )
        _solve[(count,)](
            *(beta, cu_seqlens, self.steep, self.keyed, self.system, self.inverses, self.weights, self.solved),
            *(beta.stride(0), *numbers[1:3]),
            V_HEADS=sizes["V_HEADS"],
            CHUNK=CHUNK,
            BLOCK_K=sizes["BLOCK_K"],
            **launches["_solve"],
        )


def block_of_values(block_k: int, block_v: int, itemsize: int, limits: Limits) -> int:
    """Return how many rows of a state a program has that walks over chunks: so many that few registers are spilled."""
    most = 64 if limits.is_large and itemsize == 2 else min(max(8192 // itemsize // block_k, 16), 32)
    return min(block_v, most)


def warps_of_walks(itemsize: int, limits: Limits) -> int:
    """Return how many warps hold a state, and what it is multiplied with, in registers."""
    return 8 if limits.is_small or (itemsize == 4 and limits.caps_registers) else 4


@tunable_launch(
    _decay="TOKENS num_warps",
    _steep_pairs="num_warps",
    _solve="",
    _scan="BLOCK num_warps num_stages",
)
def _launches(k_dim: int, v_dim: int, operand: str, *, limits: Limits) -> Launches:
    """What is multiplied in which precision, too; a block of v has a matrix product's shortest side at least.

    SPAN is the binary log of the largest factor that may undo a decay: an operand has to hold it, and in float32 its
    exponent has to be exact.
    """
    block_k, block_v = (max(triton.next_power_of_2(size), 16) for size in (k_dim, v_dim))
    itemsize = 4 if operand == "float32" else 2
    wide = min(block_v, 64)
    # Where matrix units read shared memory a step is a chain of products: loads go two steps ahead, if there is room.
    operands, values, state = CHUNK * (3 * block_k + 2 * CHUNK), CHUNK * wide, block_k * wide
    joined = 0  # how many steps have room
    if limits.is_large and itemsize == 2:
        joined = max(min((limits.shared_memory // itemsize - state + values) // (operands + values), 3), 0)
    # Elsewhere a program has few values, as it walks over a whole row.
    block = wide if joined else min(block_of_values(block_k, block_v, itemsize, limits), 32)
    read_ahead = (CHUNK * (3 * block_k + block + 2 * CHUNK) + block * block_k) * itemsize
    stages = 2 if itemsize == 2 and 4 * read_ahead <= 3 * limits.shared_memory else 1
    precisions = precisions_of(operand, limits)
    span = {"bfloat16": 96.0, "float16": 8.0}.get(operand, 16.0)
    decay = {"BLOCK_ROWS": 128, "BLOCK": min(block_k, 32), "SPAN": span, "num_warps": 1, "num_stages": 1}
    decay["TOKENS"] = min(max(512 // block_k, 1), 16)  # one warp: a thread sums over all of these
    steep = {"PRECISION": precisions["EXACT"], "OPERAND": getattr(tl, operand), "num_stages": 1}
    steep["num_warps"] = 8 if limits.is_small else 4
    most = 128 if joined else 64 if itemsize == 2 else 32
    solve = {"BLOCK_ROWS": 128, "BLOCK": min(block_k, most), **precisions, "num_stages": stages}
    solve["num_warps"] = 8 if limits.is_small else 4
    if itemsize == 2:
        solve |= limits.registers(168)
    scan = {"BLOCK_ROWS": 128, "BLOCK": block, "PRECISION": precisions["EXACT"], "JOINED": joined > 0}
    scan |= {"num_warps": 8 if joined else warps_of_walks(itemsize, limits), "num_stages": joined or stages}
    return {"_decay": decay, "_steep_pairs": steep, "_solve": solve, "_scan": scan}
