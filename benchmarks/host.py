"""What an eager call costs the host, from the call to its return, beside a bare launch of Triton's in the same run.

Inputs are small, so that the device is never behind. `launches watched` is the same call while a hook of Triton's
listens, which sends it through the launcher and Triton's front, as a call that is the first of its kind goes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import mamba_ops
from benchmarks import measure, peers

GOALS = {
    "selective_state_update": 2.2,
    "causal_conv1d_update": 2.0,
    "gated_delta_rule_update": 2.2,
    "mamba_chunk_scan": 5.0,
    "chunk_gated_delta_rule": 5.0,
    "selective_scan": 5.0,
    "causal_conv1d": 2.2,
}
"""Op to the most that a call should cost, in bare launches."""
ROWS, TOKENS = 4, 64

Calls = dict[str, Callable[[], object]]


def inputs(op: str, device: torch.device) -> dict[str, Any]:
    """The arguments of a call: decode with slots, or one sequence of a prompt."""

    def bf16(*shape: int) -> Tensor:
        return measure.random(*shape, device=device)

    def f32(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    slots = torch.arange(ROWS, device=device, dtype=torch.int32)
    rates, heads, dim, dstate = -torch.rand(8, device=device), 8, 64, 128
    return {
        "selective_state_update": lambda: {
            "ssm_state": f32(ROWS, heads, dim, dstate),
            "x": bf16(ROWS, heads, dim),
            "dt": bf16(ROWS, heads),
            "A": rates,
            "B": bf16(ROWS, 1, dstate),
            "C": bf16(ROWS, 1, dstate),
            "D": f32(heads),
            "dt_bias": f32(heads),
            "dt_softplus": True,
            "slots": slots,
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
        "mamba_chunk_scan": lambda: {
            "x": bf16(1, TOKENS, heads, dim),
            "dt": bf16(1, TOKENS, heads),
            "A": rates,
            "chunk_size": 64,
            "B": bf16(1, TOKENS, 1, dstate),
            "C": bf16(1, TOKENS, 1, dstate),
            "D": f32(heads),
            "dt_bias": f32(heads),
            "dt_softplus": True,
        },
        "chunk_gated_delta_rule": lambda: {
            "q": bf16(1, TOKENS, 2, dim),
            "k": bf16(1, TOKENS, 2, dim),
            "v": bf16(1, TOKENS, 4, dim),
            "g": -torch.rand(1, TOKENS, 4, device=device),
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
            "dt_softplus": True,
        },
        "causal_conv1d": lambda: {"x": bf16(1, TOKENS, 256), "weight": bf16(256, 4), "bias": bf16(256)},
    }[op]()


def bare(device: torch.device) -> Callable[[], object]:
    """Return a launch of a Triton kernel with one argument."""
    import triton
    import triton.language as tl

    def store(x):  # type: ignore[no-untyped-def]
        tl.store(x, 1.0)

    kernel, target = triton.jit(store), torch.zeros(1, device=device)
    store.__globals__["tl"] = tl
    return lambda: kernel[(1,)](target)


@contextmanager
def watched() -> Iterator[None]:
    """Within the block, a hook of Triton's hears of every launch."""
    from triton import knobs

    def heard(*_: Any, **__: Any) -> None:
        pass

    knobs.runtime.launch_enter_hook.add(heard)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(heard)


def vllm(op: str, given: dict[str, Any], out: Tensor) -> Calls:
    """Return vLLM's call of the same, where its Triton files are found."""
    peer, _ = peers.find_peer()
    if peer is None or not hasattr(peer, op):
        return {}
    state = "ssm_state" if "ssm_state" in given else "conv_state"
    call = getattr(peer, op)(**{name: value for name, value in given.items() if name not in (state, "slots")})
    return {"vllm": lambda: call(given[state], given["slots"], out)}


def us_a_call(calls: Calls, device: torch.device, rounds: int = 40, number: int = 40) -> dict[str, float]:
    """The lower quartile of rounds in which each has its turn, of fewer calls than the device's queue holds."""
    module, times = torch.get_device_module(device), {name: list[float]() for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            module.synchronize()
            start = time.perf_counter()
            for _ in range(number):
                call()
            if turn:  # the first compiles
                times[name].append(1e6 * (time.perf_counter() - start) / number)
    return {name: sorted(found)[rounds // 4] for name, found in times.items()}


def timed(op: str, device: torch.device) -> measure.Row:
    """Time an op's call in the three ways, and a bare launch in the same turns."""
    given, function = inputs(op, device), getattr(mamba_ops, op)
    with torch.inference_mode(), mamba_ops.use_backend("triton"):
        out = torch.empty_like(function(**given))
        calls: Calls = {"ours": lambda: function(**given, out=out), "bare": bare(device)}
        calls |= {"allocated": lambda: function(**given), **vllm(op, given, out)}
        row: measure.Row = {"op": op, **us_a_call(calls, device)}
        with watched():
            long = us_a_call({"watched": calls["ours"], "bare": calls["bare"]}, device, rounds=20)
    row["watched"], row["watched_bare"] = long["watched"], long["bare"]
    return row


COLUMNS: dict[str, Callable[[measure.Row], str]] = {
    "op": lambda row: str(row["op"]),
    "ours us": lambda row: measure.number(row, "ours"),
    "bare launch us": lambda row: measure.number(row, "bare"),
    "ours/bare": lambda row: measure.ratio(row, "ours", "bare"),
    "goal": lambda row: f"{GOALS[row['op']]:.1f}",
    "output allocated/bare": lambda row: measure.ratio(row, "allocated", "bare"),
    "vLLM/bare": lambda row: measure.ratio(row, "vllm", "bare"),
    "launches watched/bare": lambda row: measure.ratio(row, "watched", "watched_bare"),
}


def main() -> int:
    """Measure, print the page, and say whether every goal is met."""
    options = measure.options("host", str(__doc__), GOALS)
    if options.device.type == "cpu":
        raise SystemExit("benchmarks.host: there is no GPU here; what is timed is launching on one")
    rows = [timed(op, options.device) for op in ([options.op] if options.op else GOALS)]
    facts = measure.facts(options)
    versions = f"torch {facts['torch']}, Triton {facts['triton']}"
    notes = [f"{versions}; lower quartile of turns of 40 calls, in inference mode", peers.find_peer()[1]]
    tables = {"One eager call, output given": (COLUMNS, rows)}
    text = measure.page("The host's part of a call", facts, tables, notes)
    measure.report(options, text, {**facts, "rows": rows})
    return 0 if all(row["ours"] <= GOALS[row["op"]] * row["bare"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
