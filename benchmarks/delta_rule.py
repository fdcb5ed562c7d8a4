"""Our Triton kernels of both gated delta rules beside fla's, in one process on one device: errors first, then times.

README.md says what each column means. The layers are those of Qwen3-Next and, where channels of keys decay by
themselves, of Kimi-Linear. On a CPU ours run alone, in Triton's interpreter on small sizes, and only errors are shown.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import mamba_ops
from benchmarks import measure
from benchmarks.measure import MIXED
from benchmarks.prefill import COLUMNS, VARIANT_TOKENS, contestants, measured, variants
from mamba_ops.commands.bench.clocks import copy_bandwidth
from mamba_ops.commands.bench.run import AGREEMENT
from mamba_ops.ops import bench
from mamba_ops.ops.chunk_gated_delta_rule import bench as chunk_gated_delta_rule
from mamba_ops.ops.chunk_kda import bench as chunk_kda
from mamba_ops.ops.gated_delta_rule_update import bench as gated_delta_rule_update
from mamba_ops.ops.kda_update import bench as kda_update

PREFILL = ((512,), (2048,), (8192,), (2048,) * 8, MIXED)
DECODE = (1, 8, 64, 256)
PREFILL_BY_CHANNEL, DECODE_BY_CHANNEL = ((4096,), (1024,) * 16), (1, 64)
LIMIT = 1.05  # ours may take so many times as long as fla's

# ---- cases -----------------------------------------------------------------------------------------------------------


OPS: dict[str, tuple[Callable[[Any, torch.device], bench.Case], tuple[Any, ...], tuple[Any, ...]]] = {
    "chunk_gated_delta_rule": (chunk_gated_delta_rule.case, PREFILL, ((40,), (3, 20, 70))),
    "gated_delta_rule_update": (gated_delta_rule_update.case, DECODE, (1, 3)),
    "chunk_kda": (chunk_kda.case, PREFILL_BY_CHANNEL, ((40,), (3, 20, 70))),
    "kda_update": (kda_update.case, DECODE_BY_CHANNEL, (1, 3)),
}
"""For every op: what builds a case, of which sizes, and of which on a CPU."""


def cases_of(op: str, device: torch.device) -> Iterator[bench.Case]:
    """Yield cases one by one, as the expected result of one takes gigabytes."""
    build, sizes, small = OPS[op]
    for size in small if device.type == "cpu" else sizes:
        yield build(size, device)


# ---- measures --------------------------------------------------------------------------------------------------------


def main() -> int:
    options = measure.options("delta_rule", str(__doc__), OPS)
    device: torch.device = options.device
    timed = device.type != "cpu"
    ops = [options.op] if options.op else list(OPS)
    facts: dict[str, Any] = {**measure.facts(options), "variants": {}}
    torch.manual_seed(0)
    with torch.inference_mode(), mamba_ops.use_backend("triton"):
        for op in ops if timed else ():
            whole = op.startswith("chunk")
            sizes = (bench.spread(n, min(n, 7)) if whole else min(n, 300) for n in VARIANT_TOKENS)
            facts["variants"][op] = variants(OPS[op][0](size, device) for size in sizes)
        facts["copy_bandwidth"] = copy_bandwidth(device) if timed else None
        bandwidth = facts["copy_bandwidth"]
        groups = {
            op: [row for case in cases_of(op, device) for row in measured(case, contestants, bandwidth)] for op in ops
        }

    notes = [", ".join(f"{name} {facts[name]}" for name in ("torch", "triton"))]
    if "fla" in sys.modules:
        notes[0] += f"; fla {getattr(sys.modules['fla'], '__version__', '?')}"
    if timed:
        notes.append(measure.bandwidth_note(facts["copy_bandwidth"]))
    for op, after in facts["variants"].items():
        new = f"{after[1]} variants after the first two, +{after[-1] - after[1]} after all"
        notes.append(f"{op}, ours, {len(after)} sizes: {new}")
    passed = True
    for op, rows in groups.items():
        ratios = [
            row["ours"] / row["us"] for row in rows if row["contestant"] == "fla" and "us" in row and "ours" in row
        ]
        if ratios:
            passed &= max(ratios) <= LIMIT
            verdict = "pass" if max(ratios) <= LIMIT else "FAIL"
            notes.append(f"{op}, ours / fla: {max(ratios):.2f} at worst, at most {LIMIT}: {verdict}")
        passed &= all(row.get("steady") and row["error"] <= AGREEMENT for row in rows if row["contestant"] == "ours")
    page = measure.page("Gated delta rule", facts, {op: (COLUMNS, rows) for op, rows in groups.items()}, notes)
    measure.report(options, page, {**facts, "rows": list(itertools.chain.from_iterable(groups.values()))})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
