"""`import mamba_ops` in a fresh process: it needs torch alone, touches no GPU, and costs next to nothing."""

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
BUDGET_MS = 50

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
import sys, time, torch
sys.dont_write_bytecode, sys.pycache_prefix = False, {cache!r}  # a user has the bytecode; a checkout may not
start = time.process_time()
import mamba_ops
print(1e3 * (time.process_time() - start))
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
def test_it_costs_under_50_ms_on_top_of_torch(tmp_path: Path):
    # Processor time, since other processes are at work; the best of eight, since they slow this one down all the same,
    # and the first has to compile.
    for _ in range(8):
        done = python("-X", "importtime", "-c", COST.format(cache=str(tmp_path)))
        if float(done.stdout) < BUDGET_MS:
            return
    report = "\n".join(["self [us] | cumulative | import", *done.stderr.splitlines()[-40:]])
    raise AssertionError(f"import mamba_ops took {float(done.stdout):.0f} ms\n{report}")
