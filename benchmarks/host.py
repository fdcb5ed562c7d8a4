"""What an eager call costs the host, from the call to its return, beside a bare launch of Triton's in the same run.

Inputs are small, so that the device is never behind. `launches watched` is the same call while a hook of Triton's
listens, which sends it through the launcher and Triton's front, as a call that is the first of its kind goes.
"""

from collections.abc import Callable

import torch

import mamba_ops
from benchmarks import measure
from benchmarks.peers import versions
from mamba_ops.commands.bench import host

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


def timed(op: str, device: torch.device) -> measure.Row:
    """Time an op's call in the three ways, and a bare launch in the same turns."""
    with torch.inference_mode(), mamba_ops.use_backend("triton"):
        calls = host.calls_of(op, device)
        row: measure.Row = {"op": op, **host.us_a_call(calls, device)}
        with host.watched():
            both = {name: calls[name] for name in (host.GIVEN, host.BARE)}
            long = host.us_a_call(both, device, rounds=20)
    row["watched"], row["watched_bare"] = long[host.GIVEN], long[host.BARE]
    return row


COLUMNS: dict[str, Callable[[measure.Row], str]] = {
    "op": lambda row: str(row["op"]),
    "ours us": lambda row: measure.number(row, "ours"),
    "bare launch us": lambda row: measure.number(row, "bare"),
    "ours/bare": lambda row: measure.ratio(row, "ours", "bare"),
    "goal": lambda row: f"{GOALS[row['op']]:.1f}",
    "output allocated/bare": lambda row: measure.ratio(row, host.ALLOCATED, "bare"),
    "vLLM/bare": lambda row: measure.ratio(row, "vLLM", "bare"),
    "mamba_ssm/bare": lambda row: measure.ratio(row, "mamba_ssm", "bare"),
    "FlashInfer/bare": lambda row: measure.ratio(row, "FlashInfer", "bare"),
    "fla/bare": lambda row: measure.ratio(row, "fla", "bare"),
    "launches watched/bare": lambda row: measure.ratio(row, "watched", "watched_bare"),
}


def main() -> int:
    """Measure, print the page, and say whether every goal is met."""
    options = measure.options("host", str(__doc__), GOALS)
    if options.device.type == "cpu":
        raise SystemExit("benchmarks.host: there is no GPU here; what is timed is launching on one")
    rows = [timed(op, options.device) for op in ([options.op] if options.op else GOALS)]
    facts = measure.facts(options)
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    notes = [
        f"torch {facts['torch']}, Triton {facts['triton']}; lower quartile of turns of 40 calls, in inference mode"
    ]
    notes.append(found)
    tables = {"One eager call, output given": (COLUMNS, rows)}
    text = measure.page("The host's part of a call", facts, tables, notes)
    measure.report(options, text, {**facts, "rows": rows})
    return 0 if all(row["ours"] <= GOALS[row["op"]] * row["bare"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
