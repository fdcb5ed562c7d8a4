"""Our Triton kernel for Mamba-1's selective scan beside mamba_ssm's CUDA one, on one device: errors first, then times.

README.md says what each column means. The layer is that of Falcon-Mamba 7B. On a CPU ours runs alone, in Triton's
interpreter on small sizes, and only errors are shown.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mamba_ops
from benchmarks import measure, peers
from benchmarks.measure import AGREEMENT, MIXED, Row, nbytes
from benchmarks.peers import Prefill
from benchmarks.prefill import COLUMNS, VARIANT_TOKENS, Case, Contestants, measured, packed, spread, variants

SINGLE = (512, 2048, 8192)  # tokens of one sequence, which is what mamba_ssm's kernel takes
LIMITS = {"mamba_ssm": 1.4, "ours, channel-major": 1.1}  # for SINGLE's longest, ours may take so many times as long

# ---- cases -----------------------------------------------------------------------------------------------------------


def case_of(lengths: tuple[int, ...], device: torch.device) -> Case:
    """Packed sequences from no state; x and z, and B and C, are views of one tensor each, as the projections are."""
    dim, dstate, rank = (16, 16, 8) if device.type == "cpu" else (8192, 16, 256)
    tokens, random = sum(lengths), partial(measure.random, device=device)
    x, z = random(tokens, 2 * dim).split(dim, dim=1)
    _, B, C = random(tokens, rank + 2 * dstate).split([rank, dstate, dstate], dim=1)
    out = random(tokens, dim)
    cache = torch.randn(1 + len(lengths), dim, dstate, device=device)
    tensors = {
        "x": x,
        "dt": random(tokens, dim),
        "A": -1 - 15 * torch.rand(dim, dstate, device=device),
        "B": B,
        "C": C,
        "D": torch.randn(dim, device=device),
        "z": z,
        "dt_bias": torch.randn(dim, device=device) - 3,
        **packed(lengths, device),
    }
    name = f"{tokens} tokens" if len(lengths) == 1 else f"{len(lengths)} sequences, {tokens} tokens"
    moved = nbytes(*tensors.values(), out, cache[1:])
    return Case("selective_scan", name, tensors | {"dt_softplus": True}, "ssm_state", cache, out, moved)


def cases(device: torch.device) -> Iterator[Case]:
    """Yield cases one by one, as the expected result of one takes gigabytes."""
    for lengths in ((40,), (3, 20, 70)) if device.type == "cpu" else ((*((n,) for n in SINGLE), MIXED)):
        yield case_of(lengths, device)


def channel_major(case: Case) -> Prefill:
    """Ours, on the same numbers with a channel's tokens contiguous."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.t().contiguous().t()

    arguments = {n: moved(v) if n in ("x", "dt", "z", "B", "C") else v for n, v in case.arguments.items()}
    return replace(case, arguments=arguments, out=moved(case.out)).ours()


# ---- measures --------------------------------------------------------------------------------------------------------


def contestants(case: Case) -> Contestants:
    """Ours in both layouts and, on a GPU, the peers that are there and take this."""
    calls = {"ours": case.ours(), "ours, channel-major": channel_major(case)}
    if case.cache.device.type != "cpu" and len(case.arguments["slots"]) == 1:
        calls |= peers.present(peers.PREFILL[case.op], **case.arguments)
    return {contestant: (call, call) for contestant, call in calls.items()}


def criteria(rows: list[Row]) -> list[tuple[str, float, float]]:
    """What must hold: a sentence, the largest ratio of all cases and the most that it may be."""
    found = []
    for contestant, limit in LIMITS.items():
        longest = [row for row in rows if (row["contestant"], row["case"]) == (contestant, f"{SINGLE[-1]} tokens")]
        ratios = [row["ours"] / row["us"] for row in longest if "us" in row and "ours" in row]
        if ratios:
            found.append((f"ours / {contestant}", max(ratios), limit))
    return found


def main() -> int:
    options = measure.options("scan", str(__doc__), ["selective_scan"])
    device: torch.device = options.device
    timed = device.type != "cpu"
    facts: dict[str, Any] = {**measure.facts(options), "peers": peers.versions() if timed else {}}
    torch.manual_seed(0)
    with torch.inference_mode(), mamba_ops.use_backend("triton"):
        after = variants(case_of(spread(n, min(n, 7)), device) for n in VARIANT_TOKENS) if timed else []
        facts["copy_bandwidth"] = measure.copy_bandwidth(device) if timed else None
        rows = [row for case in cases(device) for row in measured(case, contestants, facts["copy_bandwidth"])]

    notes = [", ".join(f"{name} {facts[name]}" for name in ("torch", "triton"))]
    notes[0] += "".join(f"; {name} {version}" for name, version in facts["peers"].items())
    if timed:
        new = f"{after[1]} variants after the first two, +{after[-1] - after[1]} after all"
        notes += [measure.bandwidth_note(facts["copy_bandwidth"]), f"ours, {len(after)} token counts: {new}"]
    for what, worst, limit in criteria(rows):
        notes.append(f"{what}: {worst:.2f} at worst, at most {limit}: {'pass' if worst <= limit else 'FAIL'}")
    page = measure.page("Selective scan", facts, {"selective_scan": (COLUMNS, rows)}, notes)
    measure.report(options, page, {**facts, "variants": after, "rows": rows})
    right = all(row.get("steady") and row["error"] <= AGREEMENT for row in rows if row["contestant"].startswith("ours"))
    return 0 if right and all(worst <= limit for _, worst, limit in criteria(rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
