"""Our Triton kernels for whole sequences beside the peers', in one process on one device: errors first, then times.

README.md says what each column means. On a CPU ours run alone, in Triton's interpreter on small sizes, and only
errors are shown.
"""

import itertools
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mamba_ops
from benchmarks import measure, peers
from benchmarks.measure import AGREEMENT, Row, nbytes, number, ratio
from benchmarks.peers import Prefill

TOKENS = 16384
VARIANT_TOKENS = (3, 5, 1, 2, 4, 8, 15, 16, 17, 64, 100, 255, 256, 257, 512, 1000, 1024, 3000, 4096, 10000)
RUNS = 5  # from the same inputs, which must give the same bits: a race would show
LIMITS = {  # ours may take so many times as long as any of these
    "mamba_chunk_scan": (1.2, ("vLLM", "mamba_ssm")),
    "causal_conv1d": (1.5, ("causal-conv1d", "causal-conv1d, packed")),
}

Contestants = dict[str, tuple[Prefill, Prefill]]
"""For each by name, the call that is checked and the one that is timed."""


@dataclass(frozen=True)
class Case:
    """One set of inputs. Sequence i uses slot i + 1 of the cache; slot 0 is null."""

    op: str
    name: str
    arguments: dict[str, Any]  # of the op, but for its cache and out
    cache_name: str
    cache: Tensor
    out: Tensor
    bytes: int  # the fewest that one call can move: every input read once, every result written once

    def ours(self) -> Prefill:
        """With the arguments as the peers get them."""
        op, options = getattr(mamba_ops, self.op), {**self.arguments, "out": self.out}
        return lambda cache: op(**options, **{self.cache_name: cache})

    def expected(self) -> tuple[Tensor, Tensor]:
        """The output and the cache after it: the reference's, in float64."""

        def wide(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        cache = self.cache.double()
        with mamba_ops.use_backend("torch"):
            options = {key: wide(value) for key, value in self.arguments.items()}
            return getattr(mamba_ops, self.op)(**options, **{self.cache_name: cache}), cache


# ---- cases -----------------------------------------------------------------------------------------------------------


def scan(tokens: int, sequences: int, carried: bool, device: torch.device) -> Case:
    """The scan of a large Mamba-2 layer; x, B and C are views of one tensor, as the convolution leaves them."""
    heads, dim, dstate, groups, chunk_size = (4, 16, 16, 2, 16) if device.type == "cpu" else (128, 64, 128, 8, 256)
    random = partial(measure.random, device=device)
    x, B, C = random(tokens, heads * dim + 2 * groups * dstate).split([heads * dim, *2 * [groups * dstate]], dim=1)
    out, cache = random(tokens, heads, dim), random(1 + sequences, heads, dim, dstate)
    tensors = {
        "x": x.unflatten(1, (heads, dim)),
        "dt": random(tokens, heads),
        "A": -1 - 15 * torch.rand(heads, device=device),
        "B": B.unflatten(1, (groups, dstate)),
        "C": C.unflatten(1, (groups, dstate)),
        "D": random(heads),
        "dt_bias": random(heads) - 3,
        **packed(spread(tokens, sequences), device),
    }
    moved = nbytes(*tensors.values(), out) + (1 + carried) * nbytes(cache[1:])
    options = {"chunk_size": chunk_size, "dt_softplus": True, "has_initial_state": _carried(sequences, carried, device)}
    name = _name(sequences, carried)
    return Case("mamba_chunk_scan", name, tensors | options, "ssm_state", cache, out, moved)


def conv(tokens: int, sequences: int, carried: bool, device: torch.device) -> Case:
    """The convolution of the same layer. Its state is a transposed view, channels contiguous, as engines keep it."""
    dim, width = (48, 4) if device.type == "cpu" else (10240, 4)
    random = partial(measure.random, device=device)
    out, cache = random(tokens, dim), random(1 + sequences, width - 1, dim).transpose(1, 2)
    tensors = {
        "x": random(tokens, dim),
        "weight": random(dim, width),
        "bias": random(dim),
        **packed(spread(tokens, sequences), device),
    }
    moved = nbytes(*tensors.values(), out) + (1 + carried) * nbytes(cache[1:])
    options = {"has_initial_state": _carried(sequences, carried, device)}
    return Case("causal_conv1d", _name(sequences, carried), tensors | options, "conv_state", cache, out, moved)


def spread(tokens: int, sequences: int) -> tuple[int, ...]:
    """The lengths of so many sequences, which differ by one token at most."""
    return tuple(tokens * (i + 1) // sequences - tokens * i // sequences for i in range(sequences))


def packed(lengths: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """Where sequences of these lengths lie, and their slots."""
    return {
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device),
        "slots": torch.arange(1, len(lengths) + 1, dtype=torch.int32, device=device),
    }


def _carried(sequences: int, carried: bool, device: torch.device) -> Tensor | None:
    return torch.ones(sequences, dtype=torch.bool, device=device) if carried else None


def _name(sequences: int, carried: bool) -> str:
    many = "1 sequence" if sequences == 1 else f"{sequences} sequences"
    return f"{many}, {'initial states' if carried else 'from zero'}"


OPS: dict[str, tuple[Callable[[int, int, bool, torch.device], Case], tuple[tuple[int, bool], ...]]] = {
    "mamba_chunk_scan": (scan, ((1, False), (16, False), (1, True), (16, True))),
    "causal_conv1d": (conv, ((16, False), (16, True))),
}


def cases(op: str, device: torch.device) -> Iterator[Case]:
    """Yield cases one by one, as the expected result of one takes gigabytes."""
    build, sizes = OPS[op]
    for sequences, carried in sizes:
        yield build(64 if device.type == "cpu" else TOKENS, sequences, carried, device)


# ---- measures --------------------------------------------------------------------------------------------------------


def contestants(case: Case) -> Contestants:
    """Ours and, on a GPU, the peers that are there and can do this."""
    calls = {"ours": case.ours()}
    if case.cache.device.type != "cpu":
        known = peers.PREFILL[case.op]
        if case.arguments["has_initial_state"] is not None:
            known = {
                contestant: arrange for contestant, arrange in known.items() if arrange is not peers.cuda_conv_packed
            }
        calls |= peers.present(known, **case.arguments)
    return {contestant: (call, call) for contestant, call in calls.items()}


def correct(case: Case, call: Prefill, expected: tuple[Tensor, Tensor]) -> tuple[float, bool]:
    """The larger relative error of output and states, and whether all runs gave the same bits and left slot 0 alone."""
    first, steady = None, True
    for _ in range(RUNS):
        case.out.fill_(math.nan)
        cache = case.cache.clone()
        got = call(cache).clone(), cache
        first = first or got
        steady &= all(map(torch.equal, got, first)) and torch.equal(cache[0], case.cache[0])
    assert first is not None
    pairs = ((first[0], expected[0]), (first[1][1:], expected[1][1:]))
    return max(float((g.double() - t).norm() / t.norm()) for g, t in pairs), steady


def measured(case: Case, contestants: Callable[[Case], Contestants], bandwidth: float | None) -> list[Row]:
    """A row for each contestant; times in microseconds. A failure is noted in it, so that the others still run."""
    print(f"{case.op}: {case.name}", flush=True)
    calls, expected = contestants(case), case.expected()
    rows: list[Row] = []
    for contestant, (checked, timed) in calls.items():
        row: Row = {"op": case.op, "case": case.name, "contestant": contestant}
        rows.append(row)
        try:
            row["error"], row["steady"] = correct(case, checked, expected)
            if bandwidth is not None:
                row["us"] = measure.device_us(partial(timed, case.cache.clone()), case.cache.device)
                row |= {"bytes": case.bytes, "floor": 1e6 * case.bytes / bandwidth}
        except Exception as error:
            traceback.print_exc()
            row["failed"] = repr(error)
        if "us" in rows[0]:
            row["ours"] = rows[0]["us"]
    return rows


def variants(cases: Iterable[Case]) -> list[int]:
    """How many kernel variants Triton has made of ours after each of an op's cases.

    Comes before anything else of that op in this process: what is compiled already would not be counted.
    """
    counts = []
    for case in cases:
        with measure.compilations() as compiled:
            case.ours()(case.cache)
        counts.append(len(compiled))
    return list(itertools.accumulate(counts))


# ---- the report ------------------------------------------------------------------------------------------------------


def _error(row: Row) -> str:
    if "failed" in row:
        return "FAILED"
    remarks = [" WRONG"] * (not row["error"] <= AGREEMENT) + [" UNSTEADY"] * (not row["steady"])
    return f"{row['error']:.1e}{''.join(remarks)}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row["case"],
    "kernels": lambda row: row["contestant"],
    "us": partial(number, key="us"),
    "ours/this": partial(ratio, key="ours", base="us"),
    "MB": partial(number, key="bytes", unit=1e6),
    "floor us": partial(number, key="floor"),
    "us/floor": partial(ratio, key="us", base="floor"),
    "error": _error,
}


def criteria(rows: list[Row]) -> list[tuple[str, float, float]]:
    """What must hold: a sentence, the largest ratio of all cases and the most that it may be."""
    found = []
    for op, (limit, others) in LIMITS.items():
        for contestant in others:
            timed = [
                row
                for row in rows
                if (row["op"], row["contestant"]) == (op, contestant) and "us" in row and "ours" in row
            ]
            if timed:
                found.append((f"{op}, ours / {contestant}", max(row["ours"] / row["us"] for row in timed), limit))
    return found


def main() -> int:
    options = measure.options("prefill", str(__doc__), OPS)
    device: torch.device = options.device
    timed = device.type != "cpu"
    ops = [options.op] if options.op else list(OPS)
    facts: dict[str, Any] = {**measure.facts(options), "peers": peers.versions() if timed else {}, "variants": {}}
    torch.manual_seed(0)
    with torch.inference_mode(), mamba_ops.use_backend("triton"):
        for op in ops if timed else ():
            build = OPS[op][0]
            facts["variants"][op] = variants(build(n, min(n, 7), True, device) for n in VARIANT_TOKENS)
        facts["copy_bandwidth"] = measure.copy_bandwidth(device) if timed else None
        groups = [measured(case, contestants, facts["copy_bandwidth"]) for op in ops for case in cases(op, device)]
    rows = list(itertools.chain.from_iterable(groups))

    notes = [", ".join(f"{name} {facts[name]}" for name in ("torch", "triton"))]
    notes[0] += "".join(f"; {name} {version}" for name, version in facts["peers"].items())
    if timed:
        notes.append(measure.bandwidth_note(facts["copy_bandwidth"]))
    for op, after in facts["variants"].items():
        new = f"{after[1]} variants after the first two, +{after[-1] - after[1]} after all"
        notes.append(f"{op}, ours, {len(after)} token counts: {new}")
    for what, worst, limit in criteria(rows):
        notes.append(f"{what}: {worst:.2f} at worst, at most {limit}: {'pass' if worst <= limit else 'FAIL'}")
    tables = {op: (COLUMNS, list(group)) for op, group in itertools.groupby(rows, lambda row: row["op"])}
    measure.report(options, measure.page("Prefill", facts, tables, notes), {**facts, "rows": rows})
    right = all(row.get("steady") and row["error"] <= AGREEMENT for row in rows if row["contestant"] == "ours")
    return 0 if right and all(worst <= limit for _, worst, limit in criteria(rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
