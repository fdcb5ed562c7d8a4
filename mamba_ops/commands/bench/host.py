"""What an eager call costs the host, from the call to its return, beside a bare launch of Triton's by turns.

Inputs are small, so that the device is never behind.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from mamba_ops.commands.bench import peers
from mamba_ops.ops._common.bench import Case
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.ops._triton import _triton
from mamba_ops.registry import ops, use_backend

GIVEN, ALLOCATED, BARE = "ours", "ours, output allocated", "bare"

Calls = dict[str, Callable[[], object]]


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
    function = ops()[op]
    assert function.host_call is not None
    pattern, rows, length, sizes = function.host_call
    call = function.make_call(RandomInputs(device, rows, length, sizes=sizes), pattern)
    bound = function.__signature__.bind(*call.args, **call.kwargs).arguments
    given = {name: value for name, value in bound.items() if value is not None}
    out = torch.empty_like(function(**given))
    calls: Calls = {GIVEN: lambda: function(**given, out=out), BARE: bare(device)}
    calls[ALLOCATED] = lambda: function(**given)
    if (slots := given.get("slots")) is None:
        return calls
    caches = {name: given[name] for name in function.mutates if name in given}
    arguments = {name: value for name, value in given.items() if name not in caches}
    found, _ = peers.present(peers.of(function), Case(function, "", arguments, caches, out, (slots,)))
    for name, each in found.items():
        with suppress(Exception):  # whatever a peer raises here
            each.timed(caches, slots)
            calls[name] = partial(each.timed, caches, slots)
    return calls


def timed(op: str, device: torch.device) -> dict[str, Any]:
    """Return the microseconds of an op's call in all ways, and of a bare launch in the same turns."""
    with torch.inference_mode(), use_backend("triton"):
        return {"op": op, "us": us_a_call(calls_of(op, device), device)}


def run(
    names: Sequence[str], device: torch.device, late: Callable[[], bool], progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Time ops one by one, until it is late or somebody interrupts (Ctrl-C). A failure is noted: others still run.

    Returns what `timed` does, or why an op could not be timed, as "failed".
    """
    rows: list[dict[str, Any]] = []
    with suppress(KeyboardInterrupt):
        for done, op in enumerate(names):
            progress("host", done, len(names))
            if late():
                break
            try:
                rows.append(timed(op, device))
            except Exception as error:  # no Triton here, a refusal, memory
                rows.append({"op": op, "failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"})
    return rows
