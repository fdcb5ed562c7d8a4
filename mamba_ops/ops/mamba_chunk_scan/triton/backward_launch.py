"""How the five kernels of mamba_chunk_scan_backward are launched."""

from typing import TYPE_CHECKING, Any

import torch
import triton

from mamba_ops.ops._triton.common import cdiv, on_device_of, operand_dtype, options
from mamba_ops.ops._triton.layout import as_float32, by_token
from mamba_ops.ops._triton.limits import limits_of
from mamba_ops.ops._triton.slices import Workspace, by_slices
from mamba_ops.ops._triton.sums import add_up, clear
from mamba_ops.ops.mamba_chunk_scan.triton.backward import _carry, _step_sizes
from mamba_ops.ops.mamba_chunk_scan.triton.backward_chunks import _of_groups, _of_heads, _of_steps

if TYPE_CHECKING:
    from mamba_ops.ops.mamba_chunk_scan.training import BackwardArguments

_HEADS_PER_SPLIT = 16  # heads that a program walks over: fewer are more programs, and more sums


def mamba_chunk_scan_backward(call: "BackwardArguments") -> None:
    """Write the gradients; shapes and meaning are the op's, and are not checked again.

    Chunks are as long as registers allow, whatever `chunk_size` is: results depend on it by rounding alone. Matrix
    products are of the common dtype of x, B and C, and sum in float32; so are the states and their gradients, as they
    go from one launch to the next, which are kept for a slice of the rows (see `slices`). Tokens are read as the
    forward's kernels read them.
    """
    operand, chunk = _chunks_of(call)
    length, heads, dim, dstate = *call.x.shape[-3:], call.B.shape[-1]
    carry_dim, carry_state = _carried(operand, dim, dstate)
    by_slices(
        _backward,
        call,
        bytes_of_row=2 * operand.itemsize * cdiv(length, chunk) * heads * dim * dstate,
        walks_of_row=2 * heads * cdiv(dim, carry_dim) * cdiv(dstate, carry_state),
        parameters=("A", "D", "dt_bias"),
    )


def _chunks_of(call: "BackwardArguments") -> tuple[torch.dtype, int]:
    """The dtype of what is multiplied, and the tokens of a chunk."""
    operand = operand_dtype(call.x, call.B, call.C)
    block_dim, block_state = (_padded(size) for size in (call.x.shape[-1], call.B.shape[-1]))
    return operand, 64 if operand.itemsize < 4 and block_dim * block_state <= 64 * 128 else 32


def _padded(size: int) -> int:
    return max(int(triton.next_power_of_2(size)), 16)


def _carried(operand: torch.dtype, dim: int, dstate: int) -> tuple[int, int]:
    """The part of a head's state that a program of `_carry` has."""
    return min(_padded(dim), 64), min(_padded(dstate), 64 if operand.itemsize < 4 else 32)


def _backward(call: "BackwardArguments", space: Workspace) -> None:
    """Do it for the rows of one slice."""
    flat = call.cu_seqlens is not None
    rows = call.x.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    if flat or rows == 0:
        for gradient in (call.grad_x, call.grad_dt, call.grad_B, call.grad_C, call.grad_z):
            clear(gradient)  # of tokens that are in no row
    if rows == 0:
        for gradient in (call.grad_A, call.grad_D, call.grad_dt_bias):
            clear(gradient)
        return
    heads, dim, groups, dstate = *call.x.shape[-2:], *call.B.shape[-2:]
    x, dt, B, C, grad = (by_token(t, flat) for t in (call.x, call.dt, call.B, call.C, call.grad_output))
    z = None if call.z is None else by_token(call.z, flat)
    A = call.A.contiguous()
    D, dt_bias, cu_seqlens, initial, final = (
        None if t is None else t.contiguous()
        for t in (call.D, call.dt_bias, call.cu_seqlens, call.initial_states, call.grad_final_states)
    )
    operand, chunk = _chunks_of(call)
    x, B, C, grad = as_float32(operand, x, B, C, grad)
    tokens, length = x.shape[0], x.shape[0] if flat else call.x.shape[1]
    block_dim, block_state = _padded(dim), _padded(dstate)
    chunks = tokens // chunk + rows if flat else rows * cdiv(length, chunk)  # at most
    per_group = heads // groups
    splits = next(n for n in range(cdiv(per_group, _HEADS_PER_SPLIT), per_group + 1) if per_group % n == 0)

    steps, found = space(chunks, heads, 7, chunk), space(chunks, heads, 4, chunk)
    # Each in memory of its own: kernels are compiled for how these lie, and a half of a tensor may lie anywhere.
    starts, ends = (space(chunks, heads, dim, dstate, dtype=operand) for _ in range(2))
    shares, met = space(2, chunks, heads), space(chunks, heads)
    of_D = space(chunks, *(() if D is None else D.shape))
    of_B, of_C = (space(splits, tokens, groups, dstate) for _ in range(2))
    if flat:  # of packed rows, not all chunks and tokens are there
        for found_of_some in (shares, of_D, of_B, of_C):
            clear(found_of_some)
    aligned = all(
        t is None or (t.data_ptr() | t.stride(0) * t.itemsize | t.shape[-1] * t.itemsize) % 16 == 0
        for t in (x, B, C, z, grad)
    )
    strides = [None if t is None else t.stride(0) for t in (x, dt, B, C, grad, z)]
    shape: dict[str, Any] = {"HEADS": heads, "DIM": dim, "GROUPS": groups, "DSTATE": dstate}
    shape |= {"CHUNK": chunk, "ALIGNED": aligned, "BLOCK_ROWS": 128}
    block_heads = 512 // chunk
    limits = limits_of(x.get_device())
    warps = 8 if limits.is_small else 4
    # float32 spills less with eight warps, which take 114,816 bytes of the shared memory of NVIDIA's GPUs.
    wide = operand.itemsize == 4 and not (limits.caps_registers and limits.shared_memory < 114_816)
    ahead = limits.is_large and operand.itemsize < 4  # whether tiles of the next head fit beside those of this one
    with on_device_of(x):
        _step_sizes[(chunks, cdiv(heads, block_heads))](
            dt,
            A,
            dt_bias,
            cu_seqlens,
            steps,
            strides[1],
            length,
            rows,
            call.dt_min,
            call.dt_max,
            HEADS=heads,
            CHUNK=chunk,
            SOFTPLUS=call.dt_softplus,
            BLOCK_ROWS=128,
            BLOCK_HEADS=block_heads,
            **options(num_warps=4),
        )
        carry_dim, carry_state = _carried(operand, dim, dstate)
        _carry[(rows * heads * cdiv(dim, carry_dim) * cdiv(dstate, carry_state), 2)](
            x,
            B,
            C,
            grad,
            z,
            initial,
            final,
            cu_seqlens,
            steps,
            starts,
            ends,
            None if initial is None else call.grad_initial_states,
            strides[0],
            *strides[2:],
            length,
            rows,
            **shape,
            BLOCK_DIM=carry_dim,
            BLOCK_STATE=carry_state,
            **options(num_warps=warps, num_stages=1 if limits.is_small else 3),
        )
        of_chunks: dict[str, Any] = {"SPLITS": splits, "BLOCK_DIM": block_dim, "BLOCK_STATE": block_state}
        of_chunks["PRECISION"] = limits.precision(24) if operand == torch.float32 else "ieee"
        _of_groups[(chunks * groups * splits * 3,)](
            x,
            B,
            C,
            z,
            grad,
            cu_seqlens,
            steps,
            starts,
            ends,
            of_B,
            of_C,
            found,
            met,
            strides[0],
            *strides[2:],
            length,
            rows,
            tokens,
            **shape,
            **of_chunks,
            **options(num_warps=8 if wide else warps, num_stages=3 if ahead else 1),
        )
        _of_heads[(chunks * groups * splits,)](
            x,
            B,
            C,
            D,
            z,
            grad,
            cu_seqlens,
            steps,
            starts,
            ends,
            call.grad_x,
            call.grad_z,
            found,
            of_D,
            strides[0],
            *strides[2:],
            length,
            rows,
            **shape,
            **of_chunks,
            PART=min(block_state, 32) if operand.itemsize == 4 else block_state,
            D_PER_CHANNEL=D is not None and D.dim() == 2,
            **options(num_warps=warps, num_stages=2 if ahead else 1),
        )
        _of_steps[(chunks, cdiv(heads, block_heads))](
            dt,
            A,
            dt_bias,
            cu_seqlens,
            steps,
            found,
            met,
            call.grad_dt,
            shares,
            of_D,
            strides[1],
            length,
            rows,
            chunks,
            call.dt_min,
            call.dt_max,
            HEADS=heads,
            CHUNK=chunk,
            SOFTPLUS=call.dt_softplus,
            D_PER_HEAD=D is not None and D.dim() == 1,
            BLOCK_ROWS=128,
            BLOCK_HEADS=block_heads,
            **options(num_warps=4),
        )
    add_up(of_B.view(splits, *call.grad_B.shape), call.grad_B, many=False)
    add_up(of_C.view(splits, *call.grad_C.shape), call.grad_C, many=False)
    add_up(shares[0], call.grad_A)
    if D is not None:
        add_up(of_D, call.grad_D)
    if dt_bias is not None:
        add_up(shares[1], call.grad_dt_bias)
