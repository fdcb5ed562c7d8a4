"""How the kernels of the selective scan's backward pass are launched."""

from typing import TYPE_CHECKING

import triton

from mamba_ops.ops._triton.common import cdiv, on_device_of, options
from mamba_ops.ops._triton.layout import by_token, write_back
from mamba_ops.ops._triton.limits import limits_of
from mamba_ops.ops._triton.slices import Workspace, by_slices
from mamba_ops.ops._triton.sums import clear
from mamba_ops.ops.selective_scan.triton.backward_kernels import _boundaries, _gradients
from mamba_ops.ops.selective_scan.triton.backward_sums import _arrange, _carry, _sum_blocks, _sum_chunks

if TYPE_CHECKING:
    from mamba_ops.ops.selective_scan.training import BackwardArguments


TILE = 8  # tokens whose numbers a thread has in registers, all at once
TILES = 8  # of a chunk
BLOCK = 64  # channels of a block, a multiple of 32: as many as are summed at once for the gradients of B and C


def selective_scan_backward(call: "BackwardArguments") -> None:
    """Write the gradients; shapes and meaning are the op's, and are not checked again.

    Every token of an activation must be dense: others are copied first, as are parameters and states that are not, and
    gradients that are not are written through a copy. Keeps in float32, while it runs, a state for every 8 tokens, and
    the gradients of B and C for every 64 channels: of a slice of the rows (see `slices`).
    """
    (dim, dstate), length = call.A.shape, call.x.shape[-2]
    of_token = dim * dstate // TILE + 2 * dstate * cdiv(dim, BLOCK)
    by_slices(
        _backward,
        call,
        bytes_of_row=4 * length * of_token,
        walks_of_row=2 * dstate * cdiv(dim, 128),
        parameters=("A", "D", "dt_bias"),
    )


def _backward(call: "BackwardArguments", space: Workspace) -> None:
    """Do it for the rows of one slice."""
    flat = call.cu_seqlens is not None
    rows = call.x.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    length = call.x.shape[0] if flat else call.x.shape[1]
    gradients = {"x": call.grad_x, "dt": call.grad_dt, "B": call.grad_B, "C": call.grad_C}
    if call.z is not None:
        gradients["z"] = call.grad_z
    if rows == 0 or call.x.numel() == 0:
        for gradient in (*gradients.values(), call.grad_A, call.grad_D, call.grad_dt_bias):
            clear(gradient)
        if call.initial_states is not None:
            if call.grad_final_states is None:
                clear(call.grad_initial_states)
            else:
                call.grad_initial_states.copy_(call.grad_final_states)
        return
    if flat:  # tokens past the last row
        for gradient in gradients.values():
            clear(gradient)
    written = {name: by_token(gradient, flat) for name, gradient in gradients.items()}
    sums = {
        "A": call.grad_A,
        "D": call.grad_D,
        "dt_bias": call.grad_dt_bias,
        "initial_states": call.grad_initial_states,
    }
    sums = {name: gradient for name, gradient in sums.items() if getattr(call, name) is not None}
    summed = {name: gradient.contiguous() for name, gradient in sums.items()}
    x, dt, B, C = (by_token(tensor, flat) for tensor in (call.x, call.dt, call.B, call.C))
    z = None if call.z is None else by_token(call.z, flat)
    grad_output, grad_z = by_token(call.grad_output, flat), written.get("z")
    (dim, dstate), groups = call.A.shape, B.shape[1] if B.dim() == 3 else 1
    D, dt_bias, cu_seqlens, initial_states, grad_final_states = (
        None if t is None else t.contiguous()
        for t in (call.D, call.dt_bias, call.cu_seqlens, call.initial_states, call.grad_final_states)
    )

    chunk = TILE * TILES
    chunks = x.shape[0] // chunk + rows if flat else rows * cdiv(length, chunk)
    blocks = cdiv(dim // groups, BLOCK)

    with on_device_of(x):
        # One entry more than there are where kernels read one ahead.
        states, totals = space(chunks * TILES * dstate + 1, dim), space(chunks, TILES, dim)
        adjoints, of_chunks = space(chunks * dstate + 1, dim), space(chunks, dstate + 2, dim)
        rates, arranged = space(dstate + 1, dim), space(chunks * TILES * groups * dstate + 1, 2 * TILE)
        of_blocks = space(blocks, chunks, TILES, groups, dstate, 2 * TILE)
        strides = (x.stride(0), dt.stride(0), None if z is None else z.stride(0), grad_output.stride(0))
        sizes = {"DIM": dim, "DSTATE": dstate, "TILE": TILE, "TILES": TILES, "BLOCK_ROWS": 128}
        by_channel = [t for t in (x, dt, z, grad_output, written["x"], written["dt"], grad_z) if t is not None]
        pairs = dim // groups % 2 == 0 and all((t.data_ptr() // t.itemsize | t.stride(0)) % 2 == 0 for t in by_channel)
        of_group = {"GROUPS": groups, "SOFTPLUS": call.dt_softplus, "PAIRS": pairs}
        _arrange[(cdiv(dim, 32) + chunks * TILES * groups,)](
            *(call.A, B, C, cu_seqlens, rates, arranged),
            *(rows, length, *call.A.stride(), B.stride(0), C.stride(0)),
            **sizes,
            GROUPS=groups,
            BLOCK=triton.next_power_of_2(dstate),
            **options(num_warps=4),
        )
        _boundaries[(chunks * groups * blocks,)](
            *(x, dt, rates, arranged, z, dt_bias, grad_output, cu_seqlens),
            *(states, totals, adjoints),
            *(rows, length, 1, *strides),
            **sizes,
            **of_group,
            BLOCK=BLOCK,
            **options(num_warps=1, **limits_of(x.get_device()).registers(128)),
        )
        _carry[(rows * cdiv(dim, 128) * dstate * 2,)](
            *(initial_states, grad_final_states, summed.get("initial_states"), cu_seqlens),
            *(rates, states, totals, adjoints),
            *(rows, length),
            **sizes,
            BLOCK=128,
            **options(num_warps=1),
        )
        _gradients[(chunks * groups * blocks,)](
            *(x, dt, rates, arranged, D, z, dt_bias, grad_output, cu_seqlens),
            *(states, totals, adjoints),
            *(written["x"], written["dt"], grad_z, of_chunks, of_blocks),
            *(rows, length, chunks, 1, *strides),
            *(written["x"].stride(0), written["dt"].stride(0), None if grad_z is None else grad_z.stride(0)),
            **sizes,
            **of_group,
            BLOCK=BLOCK,
            LEVELS=(2 * TILE).bit_length() - 1,
            **options(num_warps=1),
        )
        _sum_chunks[(cdiv(dim, 64) * (dstate + 2),)](
            of_chunks,
            *(summed["A"], summed.get("D"), summed.get("dt_bias")),
            chunks,
            DIM=dim,
            DSTATE=dstate,
            BLOCK_CHUNKS=16,
            BLOCK=64,
            **options(num_warps=4),
        )
        _sum_blocks[(chunks * TILES * groups,)](
            *(of_blocks, written["B"], written["C"], cu_seqlens, rows, length, chunks),
            **sizes,
            GROUPS=groups,
            BLOCK_STATE=triton.next_power_of_2(dstate),
            BLOCK=BLOCK,
            **options(num_warps=4),
        )
    for name, gradient in gradients.items():
        write_back(written[name], gradient, flat)
    for name, gradient in sums.items():
        write_back(summed[name], gradient, True)
