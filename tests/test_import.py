"""`import mamba_ops` in a fresh process: it needs torch alone, touches no GPU, and costs little beside torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = {
    "causal_conv1d",
    "fla",
    "flashinfer",
    "jinja2",
    "mamba_ssm",
    "matplotlib",
    "numpy",
    "rich",
    "transformers",
    "triton",
    "typer",
    "vllm",
}
ON_REQUEST = ("absent", "audit", "cold_start", "commands", "compat", "ops._triton", "testing", "training")
BUDGET = 0.2  # of the time that torch's own import takes in the same process

# Torch comes first, so that only what mamba_ops adds is looked at.
LOOK = """
import json, sys, torch
before = set(sys.modules)
import mamba_ops
print(json.dumps({
    "new": sorted(set(sys.modules) - before),
    "initialized": [name for name in ("cuda", "xpu") if getattr(torch, name).is_initialized()],
}))
"""

COST = """
import gc, sys, time
sys.dont_write_bytecode, sys.pycache_prefix = False, {cache!r}  # a user has the bytecode; a checkout may not
start = time.process_time()
import torch
gc.collect()  # what torch leaves behind is torch's
middle = time.process_time()
import mamba_ops
print(middle - start, time.process_time() - middle)
"""

BLOCKED = """
import sys
sys.modules.update(dict.fromkeys({blocked}))  # a None there is how Python itself spells "cannot be imported"
import torch, mamba_ops
print(sorted(mamba_ops.registry.ops()))
"""


def python(*args: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_it_loads_nothing_optional_and_touches_no_gpu():
    seen = json.loads(python("-c", LOOK).stdout)
    assert {name for name in seen["new"] if name.partition(".")[0] in OPTIONAL} == set()
    assert "mamba_ops.ops" in seen["new"]
    loaded = [name for name in seen["new"] if f"{name}.".startswith(tuple(f"mamba_ops.{part}." for part in ON_REQUEST))]
    assert loaded == []
    assert seen["initialized"] == []


def test_it_works_where_nothing_optional_is_installed():
    assert "selective_state_update" in python("-c", BLOCKED.format(blocked=sorted(OPTIONAL))).stdout


@pytest.mark.slow  # beside another test's process it takes twice the processor time
def test_it_costs_a_fifth_of_what_torch_costs(tmp_path: Path):
    # Processor time, since other processes are at work; the best of eight, since they slow this one down all the same,
    # and the first has to compile. 33 ops and companions are declared, and their functions written.
    shares = []
    for _ in range(8):
        done = python("-X", "importtime", "-c", COST.format(cache=str(tmp_path)))
        of_torch, own = (float(part) for part in done.stdout.split())
        shares.append(own / of_torch)
        if shares[-1] < BUDGET:
            return
    report = "\n".join(["self [us] | cumulative | import", *done.stderr.splitlines()[-40:]])
    raise AssertionError(f"import mamba_ops took {1e3 * own:.0f} ms, torch {1e3 * of_torch:.0f} ms: {shares}\n{report}")
