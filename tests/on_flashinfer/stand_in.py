"""A stand-in for FlashInfer 0.7.2 on CPU tensors: the functions that the adapters call, under the vendor's signatures.

It is not the vendor's code. It holds every argument to what the vendor's sources ask of shapes, dtypes, strides and
alignment, treats padding rows as they do, and computes in loops of its own. So it shows that the adapters say
the right thing to functions of that description; that the vendor's are of that description, a GPU alone can show.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.on_flashinfer import stand_in_delta_rule as delta_rule
from tests.on_flashinfer.checks import FLOATS, INDICES, aligned, calls, has_shape
from tests.on_flashinfer.philox import rounded_to_half


@contextmanager
def installed(
    version: str = "0.7.2.post1", needed: Sequence[str] = ("cutlass", "cudnn")
) -> Iterator[list[dict[str, Any]]]:
    """Put the package in place, and what it needs of others'; yield the list of the calls that it gets."""
    functions = {
        "flashinfer": {"__version__": version, "__path__": []},
        "flashinfer.mamba": {"selective_state_update": selective_state_update},
        "flashinfer.gdn_decode": {
            "gated_delta_rule_decode_pretranspose": delta_rule.gated_delta_rule_decode_pretranspose,
        },
        "flashinfer.gdn_prefill": {"chunk_gated_delta_rule": delta_rule.chunk_gated_delta_rule},
        "flashinfer.kda": {"recurrent_kda": delta_rule.recurrent_kda},
        "flashinfer.cudnn": {"cudnn_recurrent_kda": delta_rule.cudnn_recurrent_kda},
    }
    for name in needed:
        functions[name] = {"__spec__": object()}
    before = {name: sys.modules.get(name) for name in functions}
    for name, members in functions.items():
        module = ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
    calls.clear()
    try:
        yield calls
    finally:
        for name, module_before in before.items():
            if module_before is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module_before


# ---- flashinfer.mamba -----------------------------------------------------------------------------------------------


def several_tokens(x: Tensor, cu_seqlens: Tensor | None) -> bool:
    return x.dim() == 4 or cu_seqlens is not None


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    intermediate_state_scales: Tensor | None = None,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    cache_steps: int = 0,
    algorithm: str = "auto",
    dst_state_batch_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    calls.append(dict(locals()))
    assert algorithm in ("auto", "simple", "vertical", "horizontal", "async_horizontal")
    assert intermediate_states_buffer is num_accepted_tokens is None  # the adapter has no use for them
    assert not disable_state_update
    assert backend == "auto"
    assert out is not None

    slots, heads, dim, dstate = state.shape
    assert (state.dtype == torch.int16) == (state_scale is not None)
    assert state.dtype in (*FLOATS, torch.int16)
    if state_scale is not None:
        assert state_scale.dtype == torch.float32
        has_shape(state_scale, slots, heads, dim, strides=(heads * dim, dim, 1))
        assert rand_seed is None
        assert not several_tokens(x, cu_seqlens) or algorithm != "horizontal"
    assert dim in (64, 128)
    assert dstate in (64, 96, 128, 256)
    has_shape(state, slots, heads, dim, dstate, strides=(None, dim * dstate, dstate, 1))
    aligned(state, 1)
    packed = cu_seqlens is not None
    several = x.dim() == 4 or packed
    lead = x.shape[:-2]
    batch = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else x.shape[0]
    length = x.shape[1] if x.dim() == 4 else cache_steps if packed else 1
    assert slots >= batch
    free = (None,) * len(lead)
    groups = B.shape[-2]
    assert heads % groups == 0
    assert not several or heads // groups in (1, 2, 4, 8, 16, 32, 64)
    for tensor, count, width in ((x, heads, dim), (z, heads, dim), (B, groups, dstate), (C, groups, dstate)):
        if tensor is not None:
            assert tensor.dtype == x.dtype
            has_shape(tensor, *lead, count, width, strides=(*free, width, 1))
            aligned(tensor, len(lead))
    assert x.dtype in FLOATS
    assert out.dtype == x.dtype
    has_shape(out, *x.shape, strides=(*free, dim, 1))
    assert several or out.is_contiguous()
    aligned(out, 0)
    assert dt.dtype in FLOATS
    has_shape(dt, *x.shape, strides=(*free, 1, 0))
    assert A.dtype in FLOATS
    has_shape(A, heads, dim, dstate, strides=(1, 0, 0))
    for weight in (D, dt_bias):
        if weight is not None:
            assert weight.dtype == dt.dtype
            has_shape(weight, heads, dim, strides=(1, 0))
    tables = [table for table in (state_batch_indices, dst_state_batch_indices) if table is not None]
    assert len({table.dtype for table in tables}) <= 1
    for table in tables:
        assert table.dtype in INDICES
        assert table.dim() in (1, 2)
        assert table.shape[0] >= batch
        assert table.dim() == 1 or table.shape[1] >= length
    if cu_seqlens is not None:
        assert cu_seqlens.dtype in INDICES
        assert cu_seqlens.is_contiguous()
        assert cache_steps >= 1
    elif x.dim() == 3:
        assert cache_steps == 0  # else it would see several tokens, and the output is not unsqueezed
    if rand_seed is not None:
        assert rand_seed.dtype == torch.int64
        assert rand_seed.numel() == 1
        assert philox_rounds > 0
        assert state.dtype == torch.float16
    if algorithm in ("vertical", "horizontal"):
        assert not packed

    def slot_of(table: Tensor | None, row: int, step: int) -> int:
        if table is None:
            return row
        return int(table[row] if table.dim() == 1 else table[row, step])

    def store(s: Tensor, source: int, target: int) -> None:
        assert 0 <= target < slots  # the vendor would write outside the cache
        if state_scale is not None:
            largest = s.abs().amax(-1)
            scale = torch.where(largest > 0, largest / 32767, 1.0)
            state[target], state_scale[target] = (s / scale.unsqueeze(-1)).round().to(state.dtype), scale
        elif rand_seed is None:
            state[target] = s.to(state.dtype)
        else:
            state[target] = rounded_to_half(s, int(rand_seed), source * state.stride(0), philox_rounds)

    for row in range(batch):
        first, last = (int(end) for end in cu_seqlens[row : row + 2]) if cu_seqlens is not None else (0, length)
        assert last - first <= length  # the vendor would write outside its shared memory
        if last == first:
            continue
        source = slot_of(state_batch_indices, row, 0)
        nobody = source == pad_slot_id
        assert nobody or 0 <= source < slots
        s = torch.zeros(heads, dim, dstate) if nobody else state[source].float().clone()
        if state_scale is not None and not nobody:
            s *= state_scale[source].unsqueeze(-1)
        for step, token in enumerate(range(first, last)):
            at = (token,) if packed else (row, token) if x.dim() == 4 else (row,)
            d = dt[at][:, 0].float()
            if dt_bias is not None:
                d = d + dt_bias[:, 0].float()
            if dt_softplus:
                d = torch.where(d <= 20, torch.log1p(torch.exp(d)), d)
            for h in range(heads):
                g = h // (heads // groups)
                u, b, c = x[at][h].float(), B[at][g].float(), C[at][g].float()
                s[h] = s[h] * torch.exp(A[h, 0, 0].float() * d[h]) + torch.outer(u, b * d[h])
                y = (s[h] * c).sum(1) + D[h, 0].float() * u
                if z is not None:
                    gate = z[at][h].float()
                    y = y * gate / (1 + torch.exp(-gate))
                out[at][h] = y.to(out.dtype)
            if nobody:
                continue
            if not several:  # the destination is compared with nothing
                store(
                    s,
                    source,
                    slot_of(dst_state_batch_indices, row, 0) if dst_state_batch_indices is not None else source,
                )
            elif dst_state_batch_indices is not None:
                target = slot_of(dst_state_batch_indices, row, step)
                if target != pad_slot_id:
                    store(s, source, target)
            elif token == last - 1:
                store(s, source, source)
    return out
