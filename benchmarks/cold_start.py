"""The first calls of a process: warm-up with an empty and a full cache, what compiles after it, time to first token.

The model has the shapes of Nemotron-H 8B's Mamba-2 layers, and one Mamba-1 and one gated delta net layer. Every part
runs in a process of its own; caches of compiled kernels are in a temporary folder.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.measure import Row, command, facts, page, report
from benchmarks.peers import versions
from benchmarks.serving_steps import LENGTHS
from mamba_ops.cold_start.specialization import kernel_name

ROLES = {  # and its folder of caches at the start; a folder that was used before is full
    "empty": "ours",
    "full": "ours",
    "again": "ours",
    "cold": "cold",
    "vllm": "vllm",
    "vllm_warmed": "vllm_warmed",
    "turns": "vllm",
    "compile": "compile",
}
USUAL = ("empty", "full", "cold", "vllm", "turns")

REAL: dict[str, Any] = {
    "hidden": 4096,
    "layers": 24,
    "dtype": "bfloat16",
    "most": 512,
    "mamba2": {"heads": 128, "head_dim": 64, "dstate": 128, "groups": 8, "chunk_size": 128},
    "mamba": {"d_inner": 8192, "dstate": 16},
    "gdn": {"num_k_heads": 16, "num_v_heads": 32},
}
SMALL: dict[str, Any] = {
    "hidden": 32,
    "layers": 2,
    "dtype": "float32",
    "most": 8,
    "mamba2": {"heads": 4, "head_dim": 8, "dstate": 8, "groups": 2, "chunk_size": 8},
    "mamba": {"d_inner": 16, "dstate": 4},
    "gdn": {"num_k_heads": 1, "num_v_heads": 2, "head_k_dim": 8, "head_v_dim": 8},
}


def run(role: str, options: argparse.Namespace, caches: Path) -> dict[str, Any]:
    """One part, in its process; what it printed last, and how long all of it took."""
    folder = caches / ROLES[role]
    environment = os.environ | {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    sizes = SMALL if options.device.type == "cpu" else REAL
    arguments = [role, str(options.device), json.dumps(sizes), str(options.cap)]
    begin = time.perf_counter()
    process = [sys.executable, "-m", "benchmarks.serving_steps", *arguments]
    done = subprocess.run(process, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    taken = time.perf_counter() - begin
    print(f"{role}: {taken:.0f} s", file=sys.stderr, flush=True)
    if done.returncode:
        return {"role": role, "failed": done.returncode, "process_seconds": taken}
    return {"role": role, "process_seconds": taken, **json.loads(done.stdout.splitlines()[-1])}


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def tables(results: dict[str, Any]) -> dict[str, Any]:
    """The page's tables."""

    def cell(key: str, digits: int = 2) -> Any:
        return lambda row: "-" if row.get(key) is None else f"{row[key]:.{digits}f}"

    def word(key: str) -> Any:
        return lambda row: str(row.get(key, "-"))

    parts = results["parts"]
    warm, steps, served, turns, compiles = [], [], [], [], []
    for part in parts:
        if "warm_up" in part:
            slow = "; ".join(
                f"{kernel_name(*n.rsplit('.', 1))} {k}x {s:.1f} s" for n, k, s in part["warm_up"].get("slowest", [])[:3]
            )
            requests: list[float] = part.get("requests", [])
            first = {}
            if requests:
                first = {"first": requests[0], "others": median(requests[1:]), "tenth": requests[9]}
            peak = part["warm_up"].get("peak_bytes")
            row = {"case": part["role"], "kernels": slow, "mib": peak / 2**20 if peak is not None else None}
            warm.append({**part["warm_up"], **{name: 1e3 * taken for name, taken in first.items()}, **row})
        for name in ("eager", "compiled"):
            if name in part:
                times = part[name].pop("seconds")
                steps.append({"case": name, **part[name], "median": 1e3 * median(times), "most": 1e3 * max(times)})
        if "serve" in part:
            first, more = part["serve"]["first"], part["serve"]["following"]
            row = {"case": part["role"], "prompts": len(first), "compiled": part["serve"]["compiled"]}
            row |= {"mean": 1e3 * mean(first), "p50": 1e3 * median(first), "p99": 1e3 * percentile(first, 99)}
            served.append(row | {"first": 1e3 * first[0], "following": 1e3 * median(more)})
        for contestant, taken in part.get("turns", {}).items():
            row = {"case": contestant, "tokens": len(taken), "median": 1e3 * median(taken)}
            turns.append(row | {"p10": 1e3 * percentile(taken, 10), "p90": 1e3 * percentile(taken, 90)})
        compiles += [{**c, "case": c["how"]} for c in part.get("compile", ())]
    columns: dict[str, tuple[dict[str, Any], list[Row]]] = {
        "warm-up": (
            {
                "case": word("case"),
                "s": cell("seconds"),
                "compiled": word("compiled"),
                "from disk": word("loaded"),
                "again, ms": lambda r: "-" if "again_seconds" not in r else f"{1e3 * r['again_seconds']:.1f}",
                "MiB": cell("mib", 0),
                "1st request, ms": cell("first"),
                "2nd to 10th": cell("others"),
                "10th": cell("tenth"),
                "kernels": word("kernels"),
            },
            warm,
        ),
        "random mixed batches under no_jit()": (
            {n: word(n) for n in ("case", "steps", "compiles", "recompiles")}
            | {"median ms": cell("median"), "most ms": cell("most")},
            steps,
        ),
        "time to first token, ms": (
            {"case": word("case"), "prompts": word("prompts"), "mean": cell("mean"), "P50": cell("p50")}
            | {"P99": cell("p99"), "1st prompt": cell("first"), "kernels loaded": word("compiled")}
            | {"each token after, ms": cell("following")},
            served,
        ),
        "one token, by turns in one process, ms": (
            {"case": word("case"), "tokens": word("tokens"), "P10": cell("p10"), "median": cell("median")}
            | {"P90": cell("p90")},
            turns,
        ),
        "torch.compile": (
            {"case": word("case"), "layers": word("layers"), "s": cell("seconds"), "graphs": word("graphs")},
            compiles,
        ),
    }
    return {title: table for title, table in columns.items() if table[1]}


def main() -> None:
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold_start", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=USUAL, help=f"default: {' '.join(USUAL)}")
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    parser.add_argument("--cap", type=float, default=60, metavar="SECONDS", help="stop reading prompts then")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=results, metavar="FOLDER", help="write a dated page (default: results/)"
    )
    options = parser.parse_args()
    called = command(parser, options)
    options.name, options.op = "cold_start", None
    known = facts(options) | {"command": called}
    known |= {"vllm": versions()["vLLM"], "parts": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for role in options.roles:
            known["parts"].append(run(role, options, Path(folder)))
            show(options, known)  # after each part, so that an interruption keeps the others


def show(options: argparse.Namespace, known: dict[str, Any]) -> None:
    """Write the page of the measurements so far; it is printed after the last one."""
    text = page(
        "Cold start",
        known,
        tables(json.loads(json.dumps(known))),
        [
            f"{LENGTHS}; one at a time, each with four more tokens, through the 24 Mamba-2 layers",
            "each case is a fresh process; `full` finds the caches that `empty` left, the others begin with none",
            "no embedding, no head, no attention; layers run eagerly but where `compiled` says otherwise",
            f"torch {known['torch']}, triton {known['triton']}; the Triton kernels of vLLM {known['vllm']}",
            *(f"{p['role']}: the whole process took {p['process_seconds']:.0f} s" for p in known["parts"]),
            *(f"{p['role']}: FAILED with exit code {p['failed']}" for p in known["parts"] if "failed" in p),
        ],
    )
    with contextlib.nullcontext() if len(known["parts"]) == len(options.roles) else contextlib.redirect_stdout(None):
        report(options, text, known)


if __name__ == "__main__":
    main()
