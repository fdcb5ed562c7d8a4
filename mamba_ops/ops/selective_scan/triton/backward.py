"""How the kernels of the selective scan's backward pass are launched."""

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from mamba_ops.ops._triton.common import INTERPRETED, cdiv, on_device_of, options
from mamba_ops.ops._triton.layout import by_token, write_back
from mamba_ops.ops._triton.limits import limits_of
from mamba_ops.ops._triton.sums import clear
from mamba_ops.ops.selective_scan.triton.backward_kernels import _boundaries, _gradients
from mamba_ops.ops.selective_scan.triton.backward_sums import _arrange, _carry, _sum_blocks, _sum_chunks
from mamba_ops.ops.selective_scan.triton.launch import in_words

if TYPE_CHECKING:
    from mamba_ops.ops.selective_scan.training import BackwardArguments


TILE = 8  # tokens whose numbers a thread has in registers, all at once
TILES = 8  # of a chunk
BLOCK = 32  # channels of a block, a multiple of 32: as many as are summed at once for the gradients of B and C


def selective_scan_backward(call: "BackwardArguments") -> None:
    """Write the gradients; shapes and meaning are the op's, and are not checked again.

    Every token of an activation must be dense: others are copied first, as are parameters and states that are not, and
    gradients that are not are written through a copy. Keeps in float32, while it runs, a state for every 8 tokens, and
    the gradients of B and C for every 32 channels.
    """
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

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    with on_device_of(x):
        states, totals = scratch(chunks, TILES, dstate, dim), scratch(chunks, TILES, dim)
        adjoints, of_chunks = scratch(chunks, dstate, dim), scratch(chunks, dstate + 2, dim)
        arranged = scratch(chunks, TILES, groups, dstate, 2 * TILE)
        of_blocks = scratch(blocks, chunks, TILES, groups, dstate, 2 * TILE)
        parts, width, block = _sizes(dstate)
        limit = limits_of(x.get_device()).registers(128)
        strides = (x.stride(0), dt.stride(0), None if z is None else z.stride(0), grad_output.stride(0))
        sizes = {"DIM": dim, "DSTATE": dstate, "TILE": TILE, "TILES": TILES, "BLOCK_ROWS": 128}
        of_group = {"GROUPS": groups, "SOFTPLUS": call.dt_softplus}
        words = all(in_words(t, width) for t in (B, C))
        _boundaries[(chunks * groups * cdiv(dim // groups, block),)](
            *(x, dt, call.A, B, C, z, dt_bias, grad_output, cu_seqlens),
            *(states, totals, adjoints),
            *(rows, length, 1, *call.A.stride(), *strides, B.stride(0), C.stride(0)),
            **sizes,
            **of_group,
            WORDS=words,
            BLOCK=block,
            PARTS=parts,
            WIDTH=width,
            **options(num_warps=1, **(limit if parts == 1 else {})),
        )
        _carry[(rows * cdiv(dim, 128) * dstate * 2,)](
            *(call.A, initial_states, grad_final_states, summed.get("initial_states"), cu_seqlens),
            *(states, totals, adjoints),
            *(rows, length, *call.A.stride()),
            **sizes,
            BLOCK=128,
            **options(num_warps=1),
        )
        _arrange[(chunks * TILES * groups,)](
            *(B, C, cu_seqlens, arranged, rows, length, B.stride(0), C.stride(0)),
            DSTATE=dstate,
            GROUPS=groups,
            TILE=TILE,
            TILES=TILES,
            BLOCK_ROWS=128,
            BLOCK=triton.next_power_of_2(dstate),
            **options(num_warps=4),
        )
        _gradients[(chunks * groups * blocks,)](
            *(x, dt, call.A, arranged, D, z, dt_bias, grad_output, cu_seqlens),
            *(states, totals, adjoints),
            *(written["x"], written["dt"], grad_z, of_chunks, of_blocks),
            *(rows, length, chunks, *call.A.stride(), *strides),
            *(written["x"].stride(0), written["dt"].stride(0), None if grad_z is None else grad_z.stride(0)),
            **sizes,
            **of_group,
            BLOCK=BLOCK,
            LEVELS=(2 * TILE).bit_length() - 1,
            **options(num_warps=1, **limit),
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


def _sizes(dstate: int) -> tuple[int, int, int]:
    """How `_boundaries` has a state in registers: parts, numbers of a part, and channels of a block."""
    padded = triton.next_power_of_2(dstate)
    width = min(padded, 16) if not INTERPRETED or padded <= 4 else 1
    parts = padded // width
    return parts, width, 32 if INTERPRETED else max(min(64 // parts, 32), 8)
