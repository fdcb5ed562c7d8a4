"""Our Triton kernels of both gated delta rules beside fla's, in one process on one device: errors first, then times.

README.md says what each column means. The layers are those of Qwen3-Next and, where channels of keys decay by
themselves, of Kimi-Linear. On a CPU ours run alone, in Triton's interpreter on small sizes, and only errors are shown.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mamba_ops
from benchmarks import measure, peers
from benchmarks.measure import AGREEMENT, MIXED, nbytes
from benchmarks.peers import Prefill
from benchmarks.prefill import COLUMNS, VARIANT_TOKENS, Case, Contestants, measured, packed, spread, variants

PREFILL = ((512,), (2048,), (8192,), (2048,) * 8, MIXED)
DECODE = (1, 8, 64, 256)
PREFILL_BY_CHANNEL, DECODE_BY_CHANNEL = ((4096,), (1024,) * 16), (1, 64)
LIMIT = 1.05  # ours may take so many times as long as fla's

# ---- cases -----------------------------------------------------------------------------------------------------------


def tokens_of(count: int, device: torch.device, by_channel: bool) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """q, k and v, views of one tensor as the convolution leaves them, the raw gates a and b, and an output."""
    k_heads, v_heads, dim = (2, 4, 16) if device.type == "cpu" else (32 if by_channel else 16, 32, 128)
    random, keys, values = partial(measure.random, device=device), k_heads * dim, v_heads * dim
    q, k, v = random(count, 2 * keys + values).split([keys, keys, values], dim=1)
    heads = {"q": q.unflatten(1, (k_heads, dim)), "k": k.unflatten(1, (k_heads, dim)), "v": v.unflatten(1, (-1, dim))}
    a, b = random(count, 2 * v_heads).chunk(2, dim=1)
    return heads, random(count, v_heads, dim) if by_channel else a, b, random(count, v_heads, dim)


def states_of(rows: int, out: Tensor) -> Tensor:
    return torch.randn(1 + rows, *out.shape[1:], out.shape[2], device=out.device)


def prefill(lengths: tuple[int, ...], device: torch.device, by_channel: bool = False) -> Case:
    """Packed sequences that go on from states."""
    heads, a, b, out = tokens_of(sum(lengths), device, by_channel)
    rows = len(lengths)
    cache = states_of(rows, out)
    tensors = heads | {
        "g": -0.1 * torch.nn.functional.softplus(a.float()),
        "beta": b.sigmoid(),
        **packed(lengths, device),
        "has_initial_state": torch.ones(rows, dtype=torch.bool, device=device),
    }
    one = len(set(lengths)) == 1
    name = f"{rows} x {lengths[0]} tokens" if one else f"{rows} sequences, {sum(lengths)} tokens"
    moved = nbytes(*tensors.values(), out) + 2 * nbytes(cache[1:])
    op = "chunk_kda" if by_channel else "chunk_gated_delta_rule"
    return Case(op, name, tensors | {"qk_l2norm": True}, "ssm_state", cache, out, moved)


def decode(rows: int, device: torch.device, by_channel: bool = False) -> Case:
    """One token for every row, the gates computed by the kernel; float32 states."""
    heads, a, b, out = tokens_of(rows, device, by_channel)
    cache = states_of(rows, out)
    tensors = heads | {
        "a": a,
        "b": b,
        "A_log": torch.rand(out.shape[1], device=device),
        "dt_bias": torch.randn(a.shape[1:], device=device) - 3,
        "slots": torch.arange(1, rows + 1, dtype=torch.int32, device=device),
    }
    moved = nbytes(*tensors.values(), out) + 2 * nbytes(cache[1:])
    name = f"{rows} row{'s' * (rows > 1)}"
    op = "kda_update" if by_channel else "gated_delta_rule_update"
    return Case(op, name, tensors | {"qk_l2norm": True}, "ssm_state", cache, out, moved)


OPS: dict[str, tuple[Callable[[Any, torch.device], Case], tuple[Any, ...], tuple[Any, ...]]] = {
    "chunk_gated_delta_rule": (prefill, PREFILL, ((40,), (3, 20, 70))),
    "gated_delta_rule_update": (decode, DECODE, (1, 3)),
    "chunk_kda": (partial(prefill, by_channel=True), PREFILL_BY_CHANNEL, ((40,), (3, 20, 70))),
    "kda_update": (partial(decode, by_channel=True), DECODE_BY_CHANNEL, (1, 3)),
}
"""For every op: what builds a case, of which sizes, and of which on a CPU."""


def cases(op: str, device: torch.device) -> Iterator[Case]:
    """Yield cases one by one, as the expected result of one takes gigabytes."""
    build, sizes, small = OPS[op]
    for size in small if device.type == "cpu" else sizes:
        yield build(size, device)


# ---- the peer --------------------------------------------------------------------------------------------------------


def fla(case: Case) -> tuple[Prefill, Prefill]:
    """fla's kernel as its layers call it: once with a copy of our states, for errors, and once bare, for times.

    Its states are (k_dim, v_dim) and have no slots; q, k and v are made contiguous, and the gates of decode computed,
    before the clock starts.
    """
    by_channel = "kda" in case.op
    module = peers.module("fla.ops.kda" if by_channel else "fla.ops.gated_delta_rule")
    given, many = case.arguments, case.op.startswith("chunk")
    name = "kda" if by_channel else "gated_delta_rule"
    function = getattr(module, f"chunk_{name}" if many else f"fused_recurrent_{name}")
    options, axis = ({"cu_seqlens": given["cu_seqlens"].long()}, 0) if many else ({}, 1)
    if many:
        g, beta = given["g"], given["beta"]
    else:
        steps = torch.nn.functional.softplus(given["a"].float() + given["dt_bias"])
        g, beta = -given["A_log"].exp().view(-1, *[1] * (steps.dim() - 2)) * steps, given["b"].sigmoid()
    tensors = {"q": given["q"], "k": given["k"], "v": given["v"], "g": g, "beta": beta}
    options |= {name: tensor.contiguous().unsqueeze(axis) for name, tensor in tensors.items()}
    options |= {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    start = case.cache[1:].mT.contiguous()

    def call(cache: Tensor) -> Any:
        out, last = function(initial_state=cache[1:].mT.contiguous(), **options)
        cache[1:].copy_(last.mT)
        return out.squeeze(axis)

    return call, lambda _: function(initial_state=start, **options)


# ---- measures --------------------------------------------------------------------------------------------------------


def contestants(case: Case) -> Contestants:
    """Ours and, on a GPU, fla's if it is there: a call for errors, and one for times."""
    calls = {"ours": (case.ours(), case.ours())}
    if case.cache.device.type != "cpu":
        calls |= peers.present({"fla": fla}, case=case)
    return calls


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
            sizes = (spread(n, min(n, 7)) if whole else min(n, 300) for n in VARIANT_TOKENS)
            facts["variants"][op] = variants(OPS[op][0](size, device) for size in sizes)
        facts["copy_bandwidth"] = measure.copy_bandwidth(device) if timed else None
        bandwidth = facts["copy_bandwidth"]
        groups = {
            op: [row for case in cases(op, device) for row in measured(case, contestants, bandwidth)] for op in ops
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
