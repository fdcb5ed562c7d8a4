"""The scan of Mamba-1 in mamba_ssm 2.3, over our op."""

import math
from typing import Any

from torch import Tensor

from mamba_ops import ops
from mamba_ops.compat.arguments import States, flags, floating, refuse, upcast, with_states
from mamba_ops.compat.packing import Packed, with_skip_and_gate, without_past
from mamba_ops.registry import answering


@answering
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_varlen_states: bool = False,
    **others: object,
) -> Tensor | States:
    """Scan sequences of length `length`; with `return_last_state` also return their last states, in float32.

    Differentiable: all floating-point tensors; unlike in the original, last states have gradients too.

    Args:
        u, delta, z: `(batch, dim, length)`.
        A: `(dim, dstate)`, real.
        B, C: `(batch, dstate, length)`, `(batch, groups, dstate, length)`, or for all tokens of a channel
            `(dim, dstate)`.
        D, delta_bias: `(dim,)`.
        delta_softplus: whether softplus is applied to delta after the bias.
        return_last_state: whether to return `(output, last states)`, the latter `(batch, dim, dstate)`.
        initial_states: not in the original. `(batch, dim, dstate)`.
        seq_idx, cu_seqlens, return_varlen_states: not in the original. As for `mamba_chunk_scan_combined`.
        others: refused.
    """
    name = "selective_scan_fn"
    refuse(name, **others)
    floating(name, u=u, delta=delta, delta_bias=delta_bias)  # which the op calls otherwise
    flags(name, delta_softplus=delta_softplus)
    for argument, tensor in (("B", B), ("C", C)):
        if tensor.dim() not in (3, 4) and tensor.shape != A.shape:
            expected = "(batch, dstate, length), (batch, groups, dstate, length) or (dim, dstate)"
            raise ValueError(f"{name}: {argument}: got shape {tuple(tensor.shape)}, expected {expected}")
    if return_varlen_states and cu_seqlens is None:
        raise ValueError(f"{name}: return_varlen_states: got it without cu_seqlens, expected both or neither")
    rows = (u.shape[0], u.shape[-1])
    packed = Packed(name, rows, seq_idx, cu_seqlens)
    x, dt, gate = u.transpose(1, 2), delta.transpose(1, 2), None if z is None else z.transpose(1, 2)
    by_token = _by_token(B, C, rows, A.shape[0])
    tensors: tuple[Tensor, ...]
    options: dict[str, Any] = {"cu_seqlens": packed.cu_seqlens}
    if packed.first is not None:
        x, dt = without_past(packed.first, x, dt, A, dt_bias=delta_bias, dt_softplus=delta_softplus)
        tensors = (x, dt, A, *by_token)
    else:
        tensors = (packed.flat(x), packed.flat(dt), A, *(packed.flat(t) for t in by_token))
        options |= {"D": D, "z": None if gate is None else packed.flat(gate)}
        options |= {"dt_bias": delta_bias, "dt_softplus": delta_softplus}

    def finished(y: Tensor) -> Tensor:
        y = packed.rows(y) if packed.first is None else with_skip_and_gate(y, u.transpose(1, 2), D, gate)
        return y.transpose(1, 2)

    with_last = return_last_state or return_varlen_states
    if not with_last and initial_states is None:
        return finished(ops.selective_scan(*tensors, **options))
    out, last = with_states(
        name,
        ops.selective_scan,
        *tensors,
        cache="ssm_state",
        shape=(packed.count(), *A.shape),
        dtype=upcast(u),
        initial=("initial_states", packed.initial("initial_states", initial_states)),
        **options,
    )
    if not with_last:
        return finished(out)
    row = (packed.last(last),) if return_last_state else ()
    return (finished(out), *row, *((last,) if return_varlen_states else ()))


def _by_token(B: Tensor, C: Tensor, rows: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    """Return both as the op takes them, `(batch, length, dstate)`, or with an axis of groups, of as many for both."""
    B, C = (t.expand(*rows, *t.shape) if t.dim() == 2 else t.movedim(-1, 1) for t in (B, C))
    groups = [t.shape[2] if t.dim() == 4 else 1 for t in (B, C)]
    if groups[0] == groups[1]:
        B, C = (t.unsqueeze(2) if t.dim() == 3 and 4 in (B.dim(), C.dim()) else t for t in (B, C))
        return B, C
    shared = math.lcm(*groups)
    if dim % shared:
        return B, C  # which the op refuses
    B, C = (
        (t if t.dim() == 4 else t.unsqueeze(2)).repeat_interleave(shared // count, dim=2)
        for t, count in zip((B, C), groups, strict=True)
    )
    return B, C
