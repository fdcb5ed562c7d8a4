"""What an eager call costs the host, from the call to its return, beside a bare launch of Triton's by turns.

Inputs are small, so that the device is never behind.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mamba_ops.commands.bench import peers
from mamba_ops.commands.bench.case import Case
from mamba_ops.commands.bench.clocks import random
from mamba_ops.ops._triton import _triton
from mamba_ops.registry import ops, use_backend

ROWS, TOKENS = 4, 64
GIVEN, ALLOCATED, BARE = "ours", "ours, output allocated", "bare"

Calls = dict[str, Callable[[], object]]


def _inputs(op: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a call: decode with slots, or one sequence of a prompt."""

    def bf16(*shape: int) -> Tensor:
        return random(*shape, device=device)

    def f32(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    slots = torch.arange(ROWS, device=device, dtype=torch.int32)
    rates, heads, dim, dstate = -torch.rand(8, device=device), 8, 64, 128
    weights: dict[str, Any] = {"dt_softplus": True}
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "selective_state_update": lambda: {
            "ssm_state": f32(ROWS, heads, dim, dstate),
            "x": bf16(ROWS, heads, dim),
            "dt": bf16(ROWS, heads),
            "A": rates,
            "B": bf16(ROWS, 1, dstate),
            "C": bf16(ROWS, 1, dstate),
            "D": f32(heads),
            "dt_bias": f32(heads),
            "slots": slots,
            **weights,
        },
        "causal_conv1d_update": lambda: {
            "x": bf16(ROWS, 256),
            "conv_state": bf16(ROWS, 3, 256).transpose(1, 2),
            "weight": bf16(256, 4),
            "bias": bf16(256),
            "slots": slots,
        },
        "gated_delta_rule_update": lambda: {
            "ssm_state": f32(ROWS, 4, dim, dim),
            "q": bf16(ROWS, 2, dim),
            "k": bf16(ROWS, 2, dim),
            "v": bf16(ROWS, 4, dim),
            "a": bf16(ROWS, 4),
            "b": bf16(ROWS, 4),
            "A_log": f32(4),
            "dt_bias": f32(4),
            "slots": slots,
            "qk_l2norm": True,
        },
        "kda_update": lambda: {
            "ssm_state": f32(ROWS, 4, dim, dim),
            **{name: bf16(ROWS, 4, dim) for name in ("q", "k", "v", "a")},
            "b": bf16(ROWS, 4),
            "A_log": f32(4),
            "dt_bias": f32(4, dim),
            "slots": slots,
            "qk_l2norm": True,
        },
        "mamba_chunk_scan": lambda: {
            "x": bf16(1, TOKENS, heads, dim),
            "dt": bf16(1, TOKENS, heads),
            "A": rates,
            "chunk_size": 64,
            "B": bf16(1, TOKENS, 1, dstate),
            "C": bf16(1, TOKENS, 1, dstate),
            "D": f32(heads),
            "dt_bias": f32(heads),
            **weights,
        },
        "chunk_gated_delta_rule": lambda: {
            "q": bf16(1, TOKENS, 2, dim),
            "k": bf16(1, TOKENS, 2, dim),
            "v": bf16(1, TOKENS, 4, dim),
            "g": -torch.rand(1, TOKENS, 4, device=device),
            "beta": torch.rand(1, TOKENS, 4, device=device),
        },
        "chunk_kda": lambda: {
            **{name: bf16(1, TOKENS, 4, dim) for name in ("q", "k", "v")},
            "g": -torch.rand(1, TOKENS, 4, dim, device=device),
            "beta": torch.rand(1, TOKENS, 4, device=device),
        },
        "selective_scan": lambda: {
            "x": bf16(1, 2 * TOKENS, 256),
            "dt": bf16(1, 2 * TOKENS, 256),
            "A": -torch.rand(256, 16, device=device),
            "B": bf16(1, 2 * TOKENS, 16),
            "C": bf16(1, 2 * TOKENS, 16),
            "D": f32(256),
            "dt_bias": f32(256),
            **weights,
        },
        "causal_conv1d": lambda: {"x": bf16(1, TOKENS, 256), "weight": bf16(256, 4), "bias": bf16(256)},
    }
    return made[op]()


OPS = (
    "selective_state_update",
    "causal_conv1d_update",
    "gated_delta_rule_update",
    "kda_update",
    "mamba_chunk_scan",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "selective_scan",
    "causal_conv1d",
)
"""The ops that launch kernels, by the names that `timed` takes."""


def bare(device: torch.device) -> Callable[[], object]:
    """Return a launch of a Triton kernel with one argument."""
    import triton
    import triton.language as tl

    def store(x):  # type: ignore[no-untyped-def]
        tl.store(x, 1.0)

    kernel, target = triton.jit(store), torch.zeros(1, device=device)
    store.__globals__["tl"] = tl  # Triton looks names up there
    return lambda: kernel[(1,)](target)


@contextmanager
def watched() -> Iterator[None]:
    """Within the block, a hook of Triton's hears of every launch."""
    with _triton.hook(_triton.LAUNCH_HOOKS[0], lambda *_, **__: None, "what watching costs is not seen"):
        yield


def us_a_call(calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 40) -> dict[str, float]:
    """Return the lower quartile of rounds in which each has its turn, of fewer calls than the device's queue holds."""
    module, number = torch.get_device_module(device), 40
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            module.synchronize()
            start = time.perf_counter()
            for _ in range(number):
                call()
            if turn:  # the first compiles
                times[name].append(1e6 * (time.perf_counter() - start) / number)
    return {name: sorted(found)[rounds // 4] for name, found in times.items()}


def calls_of(op: str, device: torch.device) -> Calls:
    """Return an op's call with its output given and without, a bare launch, and the calls of decode's peers."""
    given, function = _inputs(op, device), ops()[op]
    out = torch.empty_like(function(**given))
    calls: Calls = {GIVEN: lambda: function(**given, out=out), BARE: bare(device)}
    calls[ALLOCATED] = lambda: function(**given)
    if "slots" not in given:
        return calls
    caches = {name: given[name] for name in function.mutates if name in given}
    arguments = {name: value for name, value in given.items() if name not in caches}
    tables = (given["slots"],)
    case = Case(op, "", arguments, caches, out, 0, tables)
    found, _ = peers.present(peers.PEERS.get(op, {}), case)
    for name, each in found.items():
        calls[name] = lambda timed=each.timed: timed(caches, tables[0])  # type: ignore[misc]
    return calls


def timed(op: str, device: torch.device) -> dict[str, Any]:
    """Return the microseconds of an op's call in all ways, and of a bare launch in the same turns."""
    with torch.inference_mode(), use_backend("triton"):
        return {"op": op, "us": us_a_call(calls_of(op, device), device)}
