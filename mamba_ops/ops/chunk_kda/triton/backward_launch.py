"""How the kernels of chunk_kda's backward pass are launched.

Those of the forward pass come first, and leave what they found of chunks and the states before them. `_adjoints` walks
over the chunks of a row from the last one on. Then all chunks at once: `_products` finds the gradients of products of
tokens and of v, `_reads` what goes by way of states, `_pair_gradients` what goes by way of products, a part of a chunk
to a program, and `_gather` sums over the heads of v that share one of q and k.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ops.ops._triton.common import cdiv, on_device_of, operand_dtype, options, or_placeholder
from mamba_ops.ops._triton.delta_rule import CHUNK, PART, gradients_of, precisions_of
from mamba_ops.ops._triton.layout import as_float32, by_token, write_back
from mamba_ops.ops._triton.limits import Limits, limits_of
from mamba_ops.ops._triton.slices import Workspace, by_slices
from mamba_ops.ops.chunk_kda.triton.backward_pairs import _gather, _pair_gradients
from mamba_ops.ops.chunk_kda.triton.backward_states import _adjoints, _products, _reads
from mamba_ops.ops.chunk_kda.triton.kernels import _scan
from mamba_ops.ops.chunk_kda.triton.launch import Chunks, _launches, block_of_values, warps_of_walks

if TYPE_CHECKING:
    from mamba_ops.ops._common.delta_rule import BackwardArguments


def chunk_kda_backward(call: "BackwardArguments") -> None:
    """Write the gradients; shapes and meaning are the op's, and are not checked again.

    What matrix units are given is rounded to the dtype of q, k and v; float32 is multiplied in parts, or without them.
    Every token of an activation must be dense: others are copied first, as are states that are not, and gradients that
    are not are written through a copy. Keeps two states of every chunk in that dtype, and three float32 numbers for
    each token, head of v and channel of k: of a slice of the rows (see `slices`).
    """
    operand, block_k, v_padded, launches = _choices(call)
    length, v_heads, _ = call.v.shape[-3:]
    of_token = 2 * operand.itemsize * (v_padded * (block_k + CHUNK) // CHUNK + 2 * block_k + CHUNK) + 12 * block_k
    by_slices(
        _backward,
        call,
        bytes_of_row=cdiv(length, CHUNK) * CHUNK * v_heads * of_token,
        walks_of_row=v_heads * (v_padded // launches["_adjoints"]["BLOCK"]),
    )


def _choices(call: "BackwardArguments") -> tuple[torch.dtype, int, int, dict[str, dict[str, Any]]]:
    """The dtype of what is multiplied, the padded sizes of k and v, and launches."""
    operand = operand_dtype(call.q, call.k, call.v)
    block_k, v_padded = (max(int(triton.next_power_of_2(n)), 16) for n in (call.q.shape[-1], call.v.shape[-1]))
    kind, limits = str(operand).removeprefix("torch."), limits_of(call.v.get_device())
    return operand, block_k, v_padded, _backward_launches(block_k, v_padded, kind, limits)


def _backward(call: "BackwardArguments", space: Workspace) -> None:
    """Do it for the rows of one slice."""
    flat = call.cu_seqlens is not None
    rows = call.v.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    length = call.v.shape[0] if flat else call.v.shape[1]
    (k_heads, k_dim), (v_heads, v_dim) = call.q.shape[-2:], call.v.shape[-2:]
    gradients = gradients_of(call)
    if not gradients:
        return
    q, k, v, g, beta = (by_token(tensor, flat) for tensor in (call.q, call.k, call.v, call.g, call.beta))
    operand, block_k, v_padded, launches = _choices(call)
    q, k, v, grad_output = as_float32(operand, q, k, v, by_token(call.grad_output, flat))
    written = {name: by_token(gradient, flat) for name, gradient in gradients.items()}
    cu_seqlens, initial_states, grad_final_states = (
        None if t is None else t.contiguous() for t in (call.cu_seqlens, call.initial_states, call.grad_final_states)
    )
    grad_initial = None if initial_states is None else call.grad_initial_states.contiguous()

    chunks = v.shape[0] // CHUNK + rows if flat else rows * cdiv(length, CHUNK)
    places = 0
    for tensor in (q, k, v, g, grad_output, *(written[name] for name in ("q", "k", "v", "g"))):
        places |= tensor.data_ptr() | tensor.stride(0) * tensor.itemsize | tensor.shape[-1] * tensor.itemsize
    if initial_states is not None:
        places |= initial_states.data_ptr() | k_dim * initial_states.itemsize

    def scratch(*shape: int, dtype: torch.dtype = operand) -> Tensor:
        return space(chunks, v_heads, *shape, dtype=dtype)

    forward = _launches(v.get_device(), k_dim, v_dim, str(operand).removeprefix("torch."))
    sizes = {"V_HEADS": v_heads, "K_DIM": k_dim, "ALIGNED": places % 16 == 0, "CHUNK": CHUNK, "BLOCK_K": block_k}
    values = {"V_DIM": v_dim, "V_PADDED": v_padded}
    of_rows = {"BLOCK_ROWS": 128, "K_HEADS": k_heads}
    scale = k_dim**-0.5 if call.scale is None else float(call.scale)
    state, _ = or_placeholder(initial_states, v, tl.float32)
    slots, slots_stride = or_placeholder(None, v, tl.int32)
    slot_stride, *strides = (-1, 0, 0, 0) if initial_states is None else initial_states.stride()
    head_stride, value_stride, key_stride = (None, None, None) if sizes["ALIGNED"] else strides
    with on_device_of(v):
        of_chunks = Chunks.empty(scratch, block_k, keeps=True)
        of_chunks.find(
            (q, k, g, beta),
            (cu_seqlens, slots),
            (slots_stride, length, rows, -1, rows),
            {**sizes, "K_HEADS": k_heads},
            forward,
            scale=scale,
            l2norm=call.qk_l2norm,
        )
        factors, _, keyed, whole, system, solved, weights, inverses = of_chunks
        states, adjoints = scratch(v_padded, block_k), scratch(v_padded, block_k)
        new, found = scratch(CHUNK, v_padded), scratch(CHUNK, v_padded)
        _scan[(rows * v_heads * (v_padded // forward["_scan"]["BLOCK"]),)](
            *(v, cu_seqlens, state, slots, None, None, None, keyed, whole, solved, states, new),
            *(
                v.stride(0),
                None,
                slots_stride,
                None,
                None,
                slot_stride,
                head_stride,
                value_stride,
                key_stride,
            ),
            *(length, -1, rows),
            **sizes,
            **values,
            **forward["_scan"],
        )
        _adjoints[(rows * v_heads * (v_padded // launches["_adjoints"]["BLOCK"]),)](
            *(grad_output, grad_final_states, beta, cu_seqlens, keyed, whole, inverses, weights, adjoints, found),
            *(grad_initial, grad_output.stride(0), beta.stride(0), length, rows),
            **sizes,
            **values,
            BLOCK_ROWS=128,
            **launches["_adjoints"],
        )
        numbers = scratch(CHUNK, dtype=torch.float32)
        _products[(chunks * v_heads,)](
            *(v, beta, grad_output, cu_seqlens, system, inverses, new, found, weights, numbers, written["v"]),
            *(v.stride(0), beta.stride(0), grad_output.stride(0), written["v"].stride(0), length, rows),
            **{name: sizes[name] for name in ("V_HEADS", "ALIGNED", "CHUNK")},
            **values,
            BLOCK_ROWS=128,
            **launches["_products"],
        )
        grad_queries, grad_keys, decays = (scratch(CHUNK, block_k, dtype=torch.float32) for _ in range(3))
        _reads[(chunks * v_heads,)](
            *(q, k, g, beta, grad_output, cu_seqlens, factors, states, adjoints, new, found, numbers),
            *(grad_queries, grad_keys, decays, written["beta"], q.stride(0), k.stride(0), g.stride(0), beta.stride(0)),
            *(grad_output.stride(0), written["beta"].stride(0), length, rows),
            **sizes,
            **values,
            **of_rows,
            **launches["_reads"],
        )
        _pair_gradients[(chunks * v_heads * (CHUNK // PART) * (block_k // launches["_pair_gradients"]["BLOCK"]),)](
            *(q, k, g, cu_seqlens, factors, inverses, weights, grad_queries, grad_keys, decays, written["g"]),
            *(q.stride(0), k.stride(0), g.stride(0), written["g"].stride(0), length, rows),
            **sizes,
            **of_rows,
            **launches["_pair_gradients"],
        )
        _gather[(chunks * k_heads * (CHUNK // PART),)](
            *(q, k, cu_seqlens, grad_queries, grad_keys, written["q"], written["k"]),
            *(scale, q.stride(0), k.stride(0), written["q"].stride(0), written["k"].stride(0), length, rows),
            **sizes,
            **of_rows,
            L2NORM=call.qk_l2norm,
            **options(num_warps=4),
        )
    if grad_initial is not None:
        write_back(grad_initial, call.grad_initial_states, True)
    for name, gradient in gradients.items():
        write_back(written[name], gradient, flat)


def _backward_launches(block_k: int, v_padded: int, operand: str, limits: Limits) -> dict[str, dict[str, Any]]:
    """What is multiplied in which precision, too; blocks are so wide that few registers are spilled."""
    precision, itemsize = precisions_of(operand, limits)["PRECISION"], 4 if operand == "float32" else 2
    both = {"PRECISION": precision, "SUMS": precision}
    wide = min(v_padded, 64 if limits.is_large and itemsize == 2 else 32)
    walk = {"BLOCK": block_of_values(block_k, v_padded, itemsize, limits), "PRECISION": precision, "num_stages": 1}
    reads = {"BLOCK": min(block_k, 32), "BLOCK_V": wide, "num_warps": 4, "num_stages": 1}
    return {
        "_adjoints": options(**walk, num_warps=warps_of_walks(itemsize, limits)),
        "_products": options(BLOCK=wide, PRECISION=precision, num_warps=4, num_stages=1),
        "_reads": options(**reads, **both),
        "_pair_gradients": options(BLOCK=16, **both, num_warps=1, num_stages=1),
    }
