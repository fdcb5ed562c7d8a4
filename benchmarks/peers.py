"""The kernels that ours are compared with: those of `mamba-ops bench`, one more, and those of a whole layer.

They are looked for in the folder `.peers` beside benchmarks/, ignored by git, unless MAMBA_OPS_PEERS names another.
"""

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import mamba_ops
from mamba_ops.commands.bench import peers
from mamba_ops.commands.bench.peers import Arrange, module, versions
from mamba_ops.ops import bench
from mamba_ops.registry import Op

__all__ = ["module", "peers_of", "versions", "vllm_ops"]

os.environ.setdefault("MAMBA_OPS_PEERS", str(Path(__file__).parent.parent / ".peers"))


def mamba_ssm_backend(case: bench.Case) -> bench.Call:
    """mamba_ssm's kernel as a backend of our op, from examples/backend_mamba_ssm, with copies of layouts."""
    module("selective_scan_cuda")
    folder = str(Path(__file__).parent.parent / "examples" / "backend_mamba_ssm")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.import_module("mamba_ops_mamba_ssm.backends")
    adapter = mamba_ops.selective_scan.kernels["mamba_ssm"].function
    given = {name: value for name, value in case.arguments.items() if name not in ("cu_seqlens", "slots")}
    x, dt, B, C, z = (given.pop(name).unsqueeze(0) for name in ("x", "dt", "B", "C", "z"))
    A, out = given.pop("A"), torch.empty_like(x)

    def call(caches: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        adapter(x, dt, A, B, C, z=z, ssm_state=caches["ssm_state"], slots=slots, output=out, **given)
        return out[0]

    return call


def peers_of(op: Op[...]) -> dict[str, Arrange]:
    """An op's peers by name."""
    more: dict[str, Arrange] = {"mamba_ssm, as our backend": mamba_ssm_backend}
    return peers.of(op) | (more if op is mamba_ops.selective_scan else {})


def vllm_ops() -> SimpleNamespace:
    """The Triton kernels of vLLM's Mamba-2 layer."""
    ops = "vllm.model_executor.layers.mamba.ops"
    conv, ssm = module(f"{ops}.causal_conv1d"), module(f"{ops}.mamba_ssm")
    return SimpleNamespace(
        conv=conv.causal_conv1d_fn,
        conv_update=conv.causal_conv1d_update,
        update=ssm.selective_state_update,
        scan=module(f"{ops}.ssd_combined").mamba_chunk_scan_combined_varlen,
    )
