"""Mamba-3's mixer, one input and output a head (siso) and four (mimo), beside mamba_ssm's own: a prompt and a step.

The mixers have the same weights: 2048 channels, states of 128, heads of 64, bfloat16. mamba_ssm 2.3 needs TileLang for
mimo, and CuteDSL for steps; what is not there is left out. On a CPU ours run alone, on small sizes.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, peers
from benchmarks.measure import Row, number, ratio
from mamba_ops.commands.bench.clocks import by_turns
from mamba_ops.compat.mamba_ssm import Mamba3

KINDS: dict[str, dict[str, Any]] = {
    "siso": {"chunk_size": 64},
    "mimo": {"is_mimo": True, "mimo_rank": 4, "chunk_size": 16},
}
PROMPT, ROWS = 4096, 64


def mixers(kind: str, device: torch.device) -> dict[str, Any]:
    """Ours and, where it can be imported, mamba_ssm's, with the same weights."""
    small = device.type == "cpu"
    width, sizes = (128, {"d_state": 32, "headdim": 16}) if small else (2048, {"d_state": 128, "headdim": 64})
    new: dict[str, Any] = {**sizes, **KINDS[kind], "device": device}
    new["dtype"] = torch.float32 if small else torch.bfloat16
    torch.manual_seed(0)
    ours = Mamba3(width, layer_idx=0, **new)

    def theirs() -> Any:
        found = peers.module("mamba_ssm.modules.mamba3").Mamba3(width, layer_idx=0, **new)
        found.load_state_dict(ours.state_dict())
        return found

    found = {"ours": ours}
    if not small:
        try:
            found["mamba_ssm"] = theirs()
        except (ImportError, TypeError) as error:
            print(f"  mamba_ssm: {type(error).__name__}: {error}", flush=True)
    return found


def time_of(call: Callable[[], object], device: torch.device, *, is_captured: bool) -> float:
    """Microseconds of a call, which was made before: on the device alone, where it is captured, else as it is made."""
    return measure.device_us(call, device) if is_captured else by_turns({"call": call}, device)["call"]


def off(got: Tensor, other: Tensor) -> float:
    """How far two results are apart, of the largest number."""
    return float((got.float() - other.float()).abs().max() / other.float().abs().max())


def measured(kind: str, device: torch.device) -> list[Row]:
    """A row for a prompt, one for a step and one for training, printed as they come: mamba_ssm's kernels are tuned in
    minutes."""
    found = mixers(kind, device)
    width, tokens = found["ours"].d_model, 256 if device.type == "cpu" else PROMPT
    dtype = found["ours"].in_proj.weight.dtype
    prompt, token = torch.randn(1, tokens, width, device=device, dtype=dtype), torch.randn(ROWS, width, device=device)
    token = token.to(dtype)
    rows: list[Row] = []
    for what in ("prompt", "step", "prompt, training"):
        row: Row = {"call": f"{tokens} tokens" + what.removeprefix("prompt") if what != "step" else f"step of {ROWS}"}
        results = {}
        for name, mixer in found.items():
            try:
                call = calls_of(mixer, prompt, token)[what]
                with torch.set_grad_enabled("training" in what):
                    results[name] = call()
                    row[f"{name} us"] = time_of(call, device, is_captured="training" not in what)
            except (AssertionError, ImportError, RuntimeError, TypeError) as error:
                print(f"  {kind}, {what}: {name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
        if len(results) == 2:
            row["apart"] = off(*results.values())
        rows.append(row)
        print(f"  {kind}:", {name: cell(row) for name, cell in COLUMNS.items()}, flush=True)
    return rows


def calls_of(mixer: Any, prompt: Tensor, token: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is timed. Steps go on from states of zeros, which then change."""
    states = mixer.allocate_inference_cache(token.shape[0], 1)

    def train() -> Tensor:
        mixer.zero_grad()
        out: Tensor = mixer(prompt)
        out.float().square().mean().backward()
        return out

    return {
        "prompt": lambda: mixer(prompt),
        "prompt, training": train,
        "step": lambda: mixer.step(token, *states)[0],
    }


COLUMNS: dict[str, Callable[[Row], str]] = {
    "call": lambda row: str(row["call"]),
    "ours us": lambda row: number(row, "ours us"),
    "mamba_ssm us": lambda row: number(row, "mamba_ssm us"),
    "ours / mamba_ssm": lambda row: ratio(row, "ours us", "mamba_ssm us"),
    "apart": lambda row: f"{row.get('apart', math.nan):.1e}",
}


def main() -> int:
    options = measure.options("mamba3", str(__doc__), KINDS)
    facts = measure.facts(options)
    tables = {kind: (COLUMNS, measured(kind, options.device)) for kind in KINDS if options.op in (None, kind)}
    note = "apart: the largest difference of both outputs, of the largest number;"
    notes = [f"{note} but for training, calls are timed in a CUDA graph"]
    results = {**facts, **{kind: rows for kind, (_, rows) in tables.items()}}
    measure.report(options, measure.page("Mamba-3", facts, tables, notes), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
