"""Our Triton kernel for Mamba-1's selective scan beside mamba_ssm's CUDA one, on one device: errors first, then times.

README.md says what each column means. The layer is that of Falcon-Mamba 7B. On a CPU ours runs alone, in Triton's
interpreter on small sizes, and only errors are shown.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch

import mamba_ops
from benchmarks import measure
from benchmarks.measure import MIXED, Row
from benchmarks.peers import peers_of, versions
from benchmarks.prefill import COLUMNS, VARIANT_TOKENS, Contestants, measured, present, variants
from mamba_ops.commands.bench.clocks import copy_bandwidth
from mamba_ops.commands.bench.run import AGREEMENT
from mamba_ops.ops import bench
from mamba_ops.ops.selective_scan.bench import OF_TOKENS
from mamba_ops.ops.selective_scan.bench import case as scan

SINGLE = (512, 2048, 8192)  # tokens of one sequence, which is what mamba_ssm's kernel takes
LIMITS = {"mamba_ssm": 1.4, "ours, channel-major": 1.1}  # for SINGLE's longest, ours may take so many times as long

# ---- cases -----------------------------------------------------------------------------------------------------------


def cases_of(device: torch.device) -> Iterator[bench.Case]:
    """Yield cases one by one, as the expected result of one takes gigabytes."""
    for lengths in ((40,), (3, 20, 70)) if device.type == "cpu" else ((*((n,) for n in SINGLE), MIXED)):
        yield scan(lengths, device)


# ---- measures --------------------------------------------------------------------------------------------------------


def contestants(case: bench.Case) -> Contestants:
    """Ours in both layouts and, on a GPU, the peers that are there and take this."""
    calls = {"ours": case.ours(), "ours, channel-major": bench.channel_major(case, *OF_TOKENS).ours()}
    found = {name: bench.Calls(call, call) for name, call in calls.items()}
    if case.cache.device.type != "cpu" and case.rows == 1:
        found |= present(peers_of(case.op), case)
    return found


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
    facts: dict[str, Any] = {**measure.facts(options), "peers": versions() if timed else {}}
    torch.manual_seed(0)
    with torch.inference_mode(), mamba_ops.use_backend("triton"):
        after = variants(scan(bench.spread(n, min(n, 7)), device) for n in VARIANT_TOKENS) if timed else []
        facts["copy_bandwidth"] = copy_bandwidth(device) if timed else None
        rows = [row for case in cases_of(device) for row in measured(case, contestants, facts["copy_bandwidth"])]

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
