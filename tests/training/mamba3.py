"""Calls of `functional.mamba3_chunk_scan`, made of the op's samples, and the truth: autograd through its oracle."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops import functional
from mamba_ops.ops import mamba3_chunk_scan
from mamba_ops.ops._common.mamba3 import near_zero
from mamba_ops.registry import Sample, use_backend
from tests.conftest import ACCELERATOR
from tests.harness import operands_of, shifted
from tests.ops.mamba3_chunk_scan.oracle import mamba3_chunk_scan as oracle
from tests.training.gradients import assert_gradients, is_float, slip_of

STATES = functional.Mamba3States._fields
Call = dict[str, Any]
"""Arguments by name; the initial states by their own names, all there or none."""


def calls(*, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> list[tuple[str, Call]]:
    """One call of each of the op's samples that the function can be called with; tokens in no row are NaN."""
    found: dict[str, Call] = {}
    for sample in mamba3_chunk_scan.make_samples("cpu", dtype=dtype, **sizes):
        call = call_of(sample)
        if sample.name not in _THE_SAME:
            found[sample.name] = call
    return list(found.items())


_THE_SAME = ("no slots", "slot table", "null rows", "null slot 0", "write slots", "float32 output", "MIMO, write slots")
"""Samples that are others but for their caches, or their output."""


def call_of(sample: Sample) -> Call:
    """A sample's call as one of the function: without slots, and with initial states where one of its rows has any."""
    given = mamba3_chunk_scan.bind(sample.args, sample.kwargs)
    call: Call = {n: v for n, v in given.items() if n not in {"slots", "write_slots", "null_slot", "output"}}
    has_states = call.pop("has_initial_state") is not None
    ends = call["cu_seqlens"]
    rows = call["x"].shape[0] if ends is None else ends.shape[0] - 1
    for name in STATES:
        call[name] = call[name][:rows].clone() if has_states else None
    if ends is not None:
        for name, value in call.items():
            if is_float(value) and name not in STATES and value.shape[0] == call["x"].shape[0]:
                call[name] = value.clone()
                call[name][int(ends[-1]) :] = torch.nan
    return call


def run(call: Call) -> dict[str, Tensor]:
    """The output and the final states, by name."""
    inputs = {n: v for n, v in call.items() if n not in STATES}
    states = None if call[STATES[0]] is None else tuple(call[name] for name in STATES)
    output, final = functional.mamba3_chunk_scan(**inputs, initial_states=states)
    return {"output": output, **final._asdict()}


def of_oracle(call: Call, dtype: torch.dtype, **roundings: Any) -> dict[str, Tensor]:
    """The same by the oracle, which goes token by token."""
    inputs, x = {n: v for n, v in call.items() if n not in STATES}, call["x"]
    rows = x.shape[0] if call["cu_seqlens"] is None else call["cu_seqlens"].shape[0] - 1
    (heads, dim), dstate = x.shape[-2:], call["B"].shape[-1]
    rank = () if call["mimo_x"] is None else (call["mimo_x"].shape[1],)
    sizes = (heads, call["angles"].shape[-1]), (heads, dim, dstate), (*rank, heads, dstate), (heads, dim)
    states = {n: call[n] for n in STATES}
    if states[STATES[0]] is None:
        states = {n: x.new_zeros((rows, *size), dtype=dtype) for n, size in zip(STATES, sizes, strict=True)}
    sums = (*x.shape[:-2], *(rank if call["mimo_o"] is None else ()), heads, dim)
    known = {"has_initial_state": torch.ones(rows, dtype=torch.bool)}
    found = oracle(**inputs, **states, **known, out=x.new_zeros(sums, dtype=dtype), dtype=dtype, **roundings)
    return dict(zip(("output", *STATES), found, strict=True))


def leaves_of(call: Call) -> dict[str, Tensor]:
    return {n: v for n, v in call.items() if is_float(v)}


def differentiated(
    function: Callable[..., dict[str, Tensor]], call: Call, weights: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """What a function returns, and the gradients of its inputs where what it returns has those weights."""
    mine = {n: v.detach().clone().requires_grad_() if is_float(v) else v for n, v in call.items()}
    leaves = leaves_of(mine)
    with torch.enable_grad():
        results = function(mine, **options)
        loss = sum((results[n] * w.to(results[n].dtype)).sum() for n, w in weights.items())
        assert isinstance(loss, Tensor)
        loss = loss + 0 * sum(leaf.flatten()[:0].sum() for leaf in leaves.values())  # of what reads none
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    named = dict(zip((f"grad_{n}" for n in leaves), grads, strict=True))
    return {n: value.detach() for n, value in results.items()} | named


def weights_of(call: Call, seed: int = 0) -> dict[str, Tensor]:
    """Random gradients of what a call returns, of numbers that bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        results = of_oracle(converted(call, torch.float64), torch.float64)
    return {n: torch.randn(v.shape, generator=generator).bfloat16() for n, v in results.items()}


def converted(call: Call, dtype: torch.dtype) -> Call:
    return {n: v.detach().to(dtype) if is_float(v) else v for n, v in call.items()}


def judge(
    call: Call,
    backend: str = "torch",
    function: Callable[[Call], dict[str, Tensor]] = run,
    without: tuple[str, ...] = (),
) -> None:
    """Raise AssertionError unless results and gradients are within the budget that those of the ops have.

    Args:
        call: of `calls`.
        backend: that runs it.
        function: what is judged.
        without: gradients that are not looked at.
    """
    weights = weights_of(call)
    device = ACCELERATOR or "cpu" if backend == "triton" else "cpu"
    there, given = (
        {n: v.to(device) if isinstance(v, Tensor) else v for n, v in each.items()} for each in (call, weights)
    )
    with use_backend(backend):
        found = {n: v.cpu() for n, v in differentiated(function, there, given).items()}
    exact, low = (_truth(call, weights, dtype) for dtype in (torch.float64, torch.float32))
    off = near_zero(found["angle_state"].double() - exact["angle_state"])  # a turn more or less is the same
    found["angle_state"], exact["angle_state"] = exact["angle_state"] + off, exact["angle_state"]
    low["angle_state"] = exact["angle_state"] + near_zero(low["angle_state"].double() - exact["angle_state"])
    for each in (found, exact, low):
        for name in without:
            del each[name]
    slip = _slip(exact, low)
    try:
        _assert_each(found, exact, slip)
    except AssertionError:
        _assert_each(found, exact, max(slip, *_slips_next_to(call, weights, without)))


def _assert_each(found: dict[str, Tensor], exact: dict[str, Tensor], slip: float) -> None:
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in exact.items()}
    assert_gradients(found, exact, slip, "mamba3_chunk_scan")


def _truth(call: Call, weights: dict[str, Tensor], dtype: torch.dtype, **more: Any) -> dict[str, Tensor]:
    roundings = {"operands": operands_of(call), **more} if dtype == torch.float32 else {}
    return differentiated(of_oracle, converted(call, dtype), weights, dtype=dtype, **roundings)


def _slip(exact: dict[str, Tensor], low: dict[str, Tensor]) -> float:
    return slip_of({n: v for n, v in exact.items() if n.startswith("grad_")}, low)


def _slips_next_to(call: Call, weights: dict[str, Tensor], without: tuple[str, ...]) -> Iterator[float]:
    """The oracle's own errors in calls next to this one, as for the ops: see `gradients.slips_next_to`."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        other = {n: shifted(v, generator, 2**-8).float() if is_float(v) else v for n, v in call.items()}
        exact = _truth(other, weights, torch.float64)
        low = differentiated(
            of_oracle,
            converted(other, torch.float32),
            weights,
            dtype=torch.float32,
            operands=operands_of(call),
            rounds_more=seed % 2 == 1,
        )
        yield _slip({n: v for n, v in exact.items() if n not in without}, low)
