"""How the kernels of the gated delta rule's backward pass are launched: chunk by chunk, six of them.

`_systems` has all chunks at once: it normalises q and k, inverts the chunks' systems, and finds how much of what is
written every query reads. `_replay` walks over the chunks of a row and leaves the state before each and what its tokens
write; `_adjoints` walks back, and leaves the gradient of the state after each and that of what its tokens find missing.
With these all chunks are independent again. `_products` finds the gradients of the products of keys and queries;
`_gradients` makes those of q and k of them, and adds up in order what heads of v find that share a head of k. Both
leave for every token how much it counts, of which `_of_gates` makes the gradients of g and beta. The formulas are in
the reference.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from mamba_ops.ops._triton.common import cdiv, on_device_of, operand_dtype, options
from mamba_ops.ops._triton.delta_rule import CHUNK, gradients_of, precisions_of
from mamba_ops.ops._triton.layout import as_float32, by_token, write_back
from mamba_ops.ops._triton.limits import Limits, limits_of
from mamba_ops.ops._triton.slices import Workspace, by_slices
from mamba_ops.ops.chunk_gated_delta_rule.triton.backward_chunks import FACTORS, _of_gates, _products, _systems
from mamba_ops.ops.chunk_gated_delta_rule.triton.backward_gradients import _gradients
from mamba_ops.ops.chunk_gated_delta_rule.triton.backward_walks import _adjoints, _replay

if TYPE_CHECKING:
    from mamba_ops.ops.chunk_gated_delta_rule.training import BackwardArguments


def chunk_gated_delta_rule_backward(call: "BackwardArguments") -> None:
    """Write the gradients; shapes and meaning are the op's, and are not checked again.

    What matrix units are given is rounded to the dtype of q, k and v; float32 is multiplied in parts, or without them.
    Every token of an activation must be dense: others are copied first, as are states that are not, and gradients that
    are not are written through a copy. Keeps two states of every chunk, in that dtype, of a slice of the rows (see
    `slices`).
    """
    operand, block_k, v_padded, launches = _choices(call)
    length, v_heads, _ = call.v.shape[-3:]
    by_slices(
        _backward,
        call,
        bytes_of_row=2 * operand.itemsize * cdiv(length, CHUNK) * v_heads * v_padded * (block_k + CHUNK),
        walks_of_row=v_heads * cdiv(v_padded, min(launches["_replay"]["BLOCK"], 64)),
    )


def _choices(call: "BackwardArguments") -> tuple[torch.dtype, int, int, dict[str, dict[str, Any]]]:
    """The dtype of what is multiplied, the padded sizes of k and v, and launches."""
    operand = operand_dtype(call.q, call.k, call.v)
    # The assembler of CUDA 12.8 compiles `_gradients` wrongly for Hopper where float32 keys are padded to 16: matrix
    # units then read at addresses that were never computed.
    least = 32 if operand == torch.float32 else 16
    block_k = max(int(triton.next_power_of_2(call.q.shape[-1])), least)
    v_padded = max(int(triton.next_power_of_2(call.v.shape[-1])), 16)
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
    for tensor in (q, k, v, grad_output, *(written[name] for name in ("q", "k", "v"))):
        places |= tensor.data_ptr() | tensor.stride(0) * tensor.itemsize | tensor.shape[-1] * tensor.itemsize

    def scratch(*shape: int, dtype: torch.dtype = operand) -> Tensor:
        return space(chunks, *shape, dtype=dtype)

    heads = {"K_HEADS": k_heads, "V_HEADS": v_heads, "K_DIM": k_dim, "ALIGNED": places % 16 == 0}
    sizes = {**heads, "CHUNK": CHUNK, "BLOCK_ROWS": 128, "BLOCK_K": block_k}
    of_values = {**sizes, "V_DIM": v_dim, "V_PADDED": v_padded}
    scale = k_dim**-0.5 if call.scale is None else float(call.scale)
    walks = rows * v_heads
    with on_device_of(v):
        queries, keys = scratch(k_heads, CHUNK, block_k), scratch(k_heads, CHUNK, block_k)
        factors = scratch(v_heads, FACTORS.value, CHUNK, dtype=torch.float32)
        inverses, weights = scratch(v_heads, CHUNK, CHUNK), scratch(v_heads, CHUNK, CHUNK)
        states, adjoints = scratch(v_heads, v_padded, block_k), scratch(v_heads, v_padded, block_k)
        new, found = scratch(v_heads, CHUNK, v_padded), scratch(v_heads, CHUNK, v_padded)
        _systems[(chunks * v_heads,)](
            *(q, k, g, beta, cu_seqlens, queries, keys, factors, inverses, weights),
            *(scale, q.stride(0), k.stride(0), g.stride(0), beta.stride(0), length, rows),
            **sizes,
            L2NORM=call.qk_l2norm,
            **launches["_systems"],
        )
        _replay[(walks * (v_padded // launches["_replay"]["BLOCK"]),)](
            *(v, initial_states, cu_seqlens, keys, factors, inverses, states, new),
            *(v.stride(0), length, rows),
            **of_values,
            **launches["_replay"],
        )
        _adjoints[(walks * (v_padded // launches["_adjoints"]["BLOCK"]),)](
            *(grad_output, grad_final_states, cu_seqlens, queries, keys, factors, inverses, weights),
            *(adjoints, found, written["v"], grad_initial),
            *(grad_output.stride(0), written["v"].stride(0), length, rows),
            **of_values,
            **launches["_adjoints"],
        )
        numbers = scratch(v_heads, 6, CHUNK, dtype=torch.float32)
        met = scratch(v_heads, dtype=torch.float32)
        _products[(chunks * v_heads,)](
            *(grad_output, cu_seqlens, queries, keys, factors, new, found, weights, inverses, numbers),
            *(grad_output.stride(0), length, rows),
            **{name: size for name, size in of_values.items() if name != "K_DIM"},
            **launches["_products"],
        )
        _gradients[(chunks * k_heads * 2,)](
            *(q, k, v, grad_output, cu_seqlens, queries, keys, factors, states, adjoints, new, found),
            *(weights, inverses, numbers, met, written["q"], written["k"]),
            *(scale, q.stride(0), k.stride(0), v.stride(0), grad_output.stride(0)),
            *(written["q"].stride(0), written["k"].stride(0), length, rows),
            **of_values,
            L2NORM=call.qk_l2norm,
            **launches["_gradients"],
        )
        _of_gates[(chunks, cdiv(v_heads, 8))](
            *(cu_seqlens, factors, numbers, met, written["g"], written["beta"]),
            *(written["g"].stride(0), written["beta"].stride(0), length, rows),
            V_HEADS=v_heads,
            CHUNK=CHUNK,
            BLOCK_ROWS=128,
            BLOCK_HEADS=8,
            **options(num_warps=4),
        )
    if grad_initial is not None:
        write_back(grad_initial, call.grad_initial_states, True)
    for name, gradient in gradients.items():
        write_back(written[name], gradient, flat)


def _backward_launches(block_k: int, v_padded: int, operand: str, limits: Limits) -> dict[str, dict[str, Any]]:
    """What is multiplied in which precision, too; blocks of v are so wide that few registers are spilled."""
    precision = {"PRECISION": precisions_of(operand, limits)["PRECISION"]}
    is_wide = limits.is_large and operand != "float32"
    block = {"BLOCK": min(v_padded, 64 if is_wide else 32), "num_stages": 1, **precision}
    walk = {**block, "num_warps": 4, "num_stages": 2 if is_wide else 1, "TURNS": False}
    walks = {"_replay": walk, "_adjoints": walk}
    if is_wide and v_padded >= 64:
        whole = min(v_padded, 128)
        turned = {**walk, "BLOCK": whole, "num_warps": whole // 16, "TURNS": True}
        of_replay = 2 * CHUNK * (block_k + whole + CHUNK + 6)
        of_adjoints = of_replay + 2 * CHUNK * (block_k + CHUNK)
        bytes_of = {"_replay": (block_k, of_replay), "_adjoints": (max(block_k // 2, CHUNK), of_adjoints)}
        for name, (stored, a_step) in bytes_of.items():
            # A step waits for what it loads if that was not asked for two steps before.
            stages = min(3, (limits.shared_memory - 2 * CHUNK * CHUNK - 2 * whole * stored) // a_step)
            if stages > 1:
                walks[name] = {**turned, "num_stages": stages}
    registers = limits.registers(128 if is_wide else 168)
    products = {**block, "BLOCK": min(v_padded, 128 if is_wide else 32), **(limits.registers(168) if is_wide else {})}
    return {
        "_systems": options(**precision, SQUARES=is_wide, num_warps=4, **registers),
        **{name: options(**launch) for name, launch in walks.items()},
        "_products": options(**products, num_warps=4),
        # With one block of v the loop over heads would be the one whose loads are made ahead, and needs more memory.
        "_gradients": options(**{**block, "num_stages": 2 if is_wide and v_padded > 64 else 1}, num_warps=4),
    }
