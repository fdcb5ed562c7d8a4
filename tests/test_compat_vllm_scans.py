"""vLLM's scans over our ops, against the oracles."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mamba_ops.compat import vllm
from mamba_ops.registry import use_backend
from tests.ops.mamba_chunk_scan import oracle as mamba_chunk_scan
from tests.ops.selective_scan import oracle as selective_scan
from tests.vllm_inputs import DEVICE, DIM, DSTATE, GROUPS, HEADS, close, ints, normal, on_pages


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), use_backend("torch"):  # which alone takes float64
        yield


def scanned(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The oracle's results; it computes on the CPU."""
    args, kwargs = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
    return tree_map_only(Tensor, lambda t: t.to(DEVICE), selective_scan.selective_scan(*args, **kwargs))


# ---- selective_scan_fn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_selective_scan_fn(packed: bool, gated: bool, contiguous: bool) -> None:
    """The output overwrites z, or delta, if its tokens lie together; else a copy of it, and the caller's stays."""
    lead: tuple[int, ...] = () if packed else (3,)
    u, delta, gate = (normal(*lead, 12, 9) for _ in range(3))
    z = gate if gated else None
    if not contiguous:
        delta, z = (None if t is None else t.mT.contiguous().mT for t in (delta, z))
    B, C = normal(*lead, 2, 8, 9), normal(*lead, 2, 8, 9)
    A, D, bias, states = -normal(12, 8).exp(), normal(12), normal(12), on_pages(6, 12, 8)
    starts = ints(0, 4, 4, 8) if packed else None
    known = torch.tensor([True, False, False], device=DEVICE)
    rows: dict[str, Any] = {"slots": ints(3, 1, 0), "has_initial_state": known, "null_slot": 0, "cu_seqlens": starts}
    assert delta is not None
    target = delta if z is None else z
    expected, new = scanned(
        u.mT,
        delta.mT,
        A,
        B.movedim(-1, -3),
        C.movedim(-1, -3),
        D=D,
        z=None if z is None else z.mT,
        dt_bias=bias,
        dt_softplus=True,
        ssm_state=states,
        out=target.mT,
        **rows,
    )
    before = target.clone(), states[0].clone(), u.clone()
    out = vllm.selective_scan_fn(u, states, delta, A, B, C, D, z, bias, True, starts, rows["slots"], known)
    assert (out is target) == contiguous
    close((out.mT, states), (expected, new))
    close((states[0], u), before[1:])
    if not contiguous:
        close(target, before[0])
    if packed:
        assert torch.equal(out[:, 8:], before[0][:, 8:])  # tokens of no sequence


def test_selective_scan_fn_without_groups_and_indices() -> None:
    u, delta, A, states = normal(12, 7), normal(12, 7), -normal(12, 8).exp(), normal(2, 12, 8)
    B, C, starts = normal(8, 7), normal(8, 7), ints(0, 3, 7)
    expected, new = scanned(u.t(), delta.t(), A, B.t(), C.t(), cu_seqlens=starts, ssm_state=states)
    close((vllm.selective_scan_fn(u, states, delta, A, B, C, query_start_loc=starts).t(), states), (expected, new))


def test_selective_scan_fn_keeps_the_states_of_a_prefix_cache() -> None:
    u, delta, z, states = normal(12, 10), normal(12, 10), normal(12, 10), on_pages(9, 12, 8)
    A, B, C = -normal(12, 8).exp(), normal(1, 8, 10), normal(1, 8, 10)
    starts, table = ints(0, 6, 10), ints([1, 2, 3], [4, 5, 6])
    first, last, initial, ends, chunks = ints(0, 1), ints(1, 1), ints(0, 0), ints(0, 4, 6, 10), ints(1, 2)
    known = torch.tensor([False, True], device=DEVICE)
    expected, new = scanned(
        u.t(),
        delta.t(),
        A,
        B.movedim(-1, 0),
        C.movedim(-1, 0),
        z=z.t(),
        cu_seqlens=starts,
        ssm_state=states,
        slots=table,
        has_initial_state=known,
        null_slot=0,
        block_size=4,
        first_block=first,
        last_block=last,
        initial_block=initial,
        chunk_ends=ends[1:],
        last_chunk=chunks,
    )
    rows = (starts, table, known, 0, 4, first, last, initial, ends, chunks)
    out = vllm.selective_scan_fn(u, states, delta, A, B, C, None, z, None, False, *rows)
    close((out.t(), states), (expected, new))


# ---- mamba_chunk_scan_combined_varlen --------------------------------------------------------------------------------

CHUNKS = {  # of rows of 6, 5, 0 and 3 tokens with 0, 3, 0 and 8 before them, in chunks of 4: where chunks end, the last
    "by position": ((4, 6, 7, 11, 14), (1, 3, 3, 4)),
    "with a checkpoint": ((4, 5, 6, 7, 11, 14), (2, 4, 4, 5)),
    "by packed token": ((4, 6, 8, 11, 12, 14), (1, 3, 3, 5)),
}


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("to", ["cache", "returned", "after every chunk"])
def test_mamba_chunk_scan_combined_varlen(to: str, chunks: str, initial: bool) -> None:
    ends, last = CHUNKS[chunks]
    starts, n, tokens = ints(0, 6, 11, 11, 14), 4, 15
    x, z, dt = normal(tokens, HEADS, DIM), normal(tokens, HEADS, DIM), normal(tokens, HEADS)
    B, C = normal(tokens, GROUPS, DSTATE), normal(tokens, GROUPS, DSTATE)
    A, D, bias = -normal(HEADS).exp(), normal(HEADS), normal(HEADS)
    states = normal(n, HEADS, DIM, DSTATE) if initial else None
    own = torch.zeros(n, HEADS, DIM, DSTATE, device=DEVICE, dtype=torch.float64) if states is None else states
    options: dict[str, Any] = {"D": D, "z": z, "dt_bias": bias, "dt_softplus": True}
    out = normal(tokens, HEADS, DIM)
    expected, final, _ = mamba_chunk_scan.mamba_chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        4,
        **options,
        dt_min=0.2,
        dt_max=0.9,
        cu_seqlens=starts,
        ssm_state=own,
        has_initial_state=torch.ones(n, dtype=torch.bool, device=DEVICE),
        out=out,
    )
    cache, slots = on_pages(7, HEADS, DIM, DSTATE), ints(5, 0, 2, -1)
    before = cache.clone()
    given = {"final_states_out": cache, "final_state_indices": slots} if to == "cache" else {}
    result = vllm.mamba_chunk_scan_combined_varlen(
        x,
        dt,
        A,
        B,
        C,
        4,
        starts,
        ints(0, *ends),
        ints(*last),
        ints(*range(len(ends))),
        out,
        **options,
        initial_states=states,
        dt_limit=(0.2, 0.9),
        return_intermediate_states=to == "after every chunk",
        **given,
    )
    close(out, expected)
    assert final is not None
    if to == "cache":
        before[[5, 0, 2]] = final[:3]
        assert result is None
        close(cache, before)
    elif to == "returned":
        close(result, final)
    else:
        assert result is not None
        assert result.shape == (len(ends), HEADS, DIM, DSTATE)
        close(result[[last[0], last[1], last[3]]], final[[0, 1, 3]])
        for chunk, end in enumerate(ends):  # a sequence that ends there has that state last
            row = next(i for i, begin in enumerate((0, 6, 11)) if begin < end <= (6, 11, 14)[i])
            _, at, _ = mamba_chunk_scan.mamba_chunk_scan(
                *(t[(0, 6, 11)[row] : end] for t in (x, dt)),
                A,
                *(t[(0, 6, 11)[row] : end] for t in (B, C)),
                4,
                dt_bias=bias,
                dt_softplus=True,
                dt_min=0.2,
                dt_max=0.9,
                cu_seqlens=ints(0, end - (0, 6, 11)[row]),
                ssm_state=own[[0, 1, 3][row]].unsqueeze(0),
                has_initial_state=torch.ones(1, dtype=torch.bool, device=DEVICE),
            )
            close(result[chunk : chunk + 1], at)


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_states_are_returned_in_the_dtype_asked_for(dtype: torch.dtype | None) -> None:
    x, dt, B = normal(5, 2, 3).float(), normal(5, 2).float(), normal(5, 1, 4).bfloat16()
    chunks = (ints(0, 5), ints(0, 4, 5), ints(1), ints(0, 0))
    for more in (True, False):
        states = vllm.mamba_chunk_scan_combined_varlen(
            x, dt, -dt[0].exp(), B, B, 4, *chunks, x.clone(), state_dtype=dtype, return_intermediate_states=more
        )
        assert states is not None
        assert states.dtype == (dtype or torch.bfloat16)
        assert len(states) == 1 + more


def test_a_cache_and_all_states_exclude_each_other() -> None:
    arguments = (normal(2, 2, 3), normal(2, 2), normal(2), normal(2, 1, 4), normal(2, 1, 4), 4)
    chunks = (ints(0, 2), ints(0, 2), ints(0), ints(0), normal(2, 2, 3))
    cache = {"final_states_out": normal(3, 2, 3, 4), "final_state_indices": ints(1)}
    with pytest.raises(ValueError, match="return_intermediate_states: got it with final_states_out"):
        vllm.mamba_chunk_scan_combined_varlen(*arguments, *chunks, return_intermediate_states=True, **cache)
    with pytest.raises(
        ValueError, match="final_state_indices: got one of it and final_states_out, expected both or neither"
    ):
        vllm.mamba_chunk_scan_combined_varlen(*arguments, *chunks, final_states_out=cache["final_states_out"])
