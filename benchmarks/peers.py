"""The kernels that ours are timed beside: found if they can be imported, never required, never in this repository.

A peer takes the arguments of our fronts, arranges them once as its own layers would, and returns the call to time.
"""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

Call = Callable[[Tensor, Tensor, Tensor], object]
"""(state, slots, out); everything else is already bound."""

_FOLDER = Path(__file__).parent.parent / ".peers"
_OPS = "vllm.model_executor.layers.mamba.ops"


@dataclass(frozen=True)
class Peer:
    """vLLM's two Triton kernels. It takes slot 0 for nobody, so callers use the slots from 1 on."""

    name: str
    _selective_state_update: Callable[..., Any]
    _causal_conv1d_update: Callable[..., Any]

    def selective_state_update(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        *,
        D: Tensor,
        dt_bias: Tensor,
        z: Tensor | None = None,
        dt_softplus: bool = False,
    ) -> Call:
        if x.dim() == 3:  # ours takes one value per head; the peer recognises the same by strides of 0
            dim, dstate = x.shape[-1], B.shape[-1]
            A = A[:, None, None].expand(-1, dim, dstate)
            dt, D, dt_bias = (t[..., None].expand(*t.shape, dim) for t in (dt, D, dt_bias))
        kernel = self._selective_state_update
        options = {"z": z, "dt_softplus": dt_softplus}
        return lambda state, slots, out: kernel(
            state, x, dt, A, B, C, D, dt_bias, state_batch_indices=slots, out=out, **options
        )

    def causal_conv1d_update(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = True) -> Call:
        kernel = self._causal_conv1d_update
        return lambda state, slots, out: kernel(x, state, weight, bias, silu, conv_state_indices=slots, out=out)


def find_peer() -> tuple[Peer | None, str]:
    """The peer, or None, and a sentence that says which. MAMBA_OPS_PEERS names a folder to look in before the installed
    packages (default: .peers beside benchmarks/)."""
    folder = Path(os.environ.get("MAMBA_OPS_PEERS", _FOLDER)).resolve()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        version = importlib.import_module("vllm").__version__
        mamba_ssm = importlib.import_module(f"{_OPS}.mamba_ssm")
        causal_conv1d = importlib.import_module(f"{_OPS}.causal_conv1d")
    except ImportError as error:
        return None, f"No peer: vLLM's kernels are neither in {folder} nor installed ({error})."
    peer = Peer(f"vLLM {version}", mamba_ssm.selective_state_update, causal_conv1d.causal_conv1d_update)
    return peer, f"Peer: {peer.name}, from {Path(str(mamba_ssm.__file__)).parent}."
