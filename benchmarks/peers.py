"""The kernels that ours are compared with: used if they can be imported, never required, not in this repository.

A peer takes the arguments of our fronts, arranges them once as its own layers would, and returns the call to time.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

import mamba_ops

Call = Callable[[Tensor, Tensor, Tensor], object]
"""(state, slots, out); everything else is already bound."""

Prefill = Callable[[Tensor], Any]
"""From the cache, which it updates, to the output, a tensor; everything else is already bound."""

T = TypeVar("T")

_FOLDER = Path(__file__).parent.parent / ".peers"
_OPS = "vllm.model_executor.layers.mamba.ops"


def module(name: str) -> ModuleType:
    """A peer's module; those of the folder that MAMBA_OPS_PEERS names (default: .peers beside benchmarks/) come before
    installed ones."""
    folder = str(Path(os.environ.get("MAMBA_OPS_PEERS", _FOLDER)).resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def present(known: Mapping[str, Callable[..., T]], **arguments: Any) -> dict[str, T]:
    """Return the calls of the peers that are installed, made from the arguments; print which are not."""
    arranged = {}
    for contestant, arrange in known.items():
        try:
            arranged[contestant] = arrange(**arguments)
        except ImportError as error:
            print(f"  no {contestant}: {error}", flush=True)
    return arranged


# ---- decode ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """vLLM's two Triton kernels. Slot 0 is its null slot, so callers use the slots from 1 on."""

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
    """The peer of the decode kernels, or None, and a sentence that says which."""
    try:
        version = module("vllm").__version__
        mamba_ssm, causal_conv1d = module(f"{_OPS}.mamba_ssm"), module(f"{_OPS}.causal_conv1d")
    except ImportError as error:
        return None, f"No peer: vLLM's kernels cannot be imported ({error})."
    peer = Peer(f"vLLM {version}", mamba_ssm.selective_state_update, causal_conv1d.causal_conv1d_update)
    return peer, f"Peer: {peer.name}, from {Path(str(mamba_ssm.__file__)).parent}."


# ---- prefill: sequences are of one length, packed, and sequence i uses slot i + 1 ------------------------------------


def vllm_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    cu_seqlens: Tensor,
    slots: Tensor,
    has_initial_state: Tensor | None,
    **weights: Any,
) -> Prefill:
    """vLLM's layer gathers the initial states, where there are any; its table of chunks is made once for all layers."""
    scan = module(f"{_OPS}.ssd_combined").mamba_chunk_scan_combined_varlen
    gather = module(f"{_OPS}.gather_initial_states").gather_initial_states
    ends, row_of, last = [0], [], []
    for row, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        new = [*range(start + chunk_size, stop, chunk_size), stop]
        ends += new
        row_of += [row] * len(new)
        last.append(len(row_of) - 1)
    table = {"cu_chunk_seqlens": ends, "seq_idx": row_of, "last_chunk_indices": last}
    options = {key: torch.tensor(value, dtype=torch.int32, device=x.device) for key, value in table.items()}
    options |= weights | {"cu_seqlens": cu_seqlens, "out": x.new_empty(x.shape), "final_state_indices": slots}

    def call(cache: Tensor) -> Any:
        initial = None if has_initial_state is None else gather(cache, slots, has_initial_state)
        kept = {"initial_states": initial, "final_states_out": cache, "state_dtype": cache.dtype}
        scan(x, dt, A, B, C, chunk_size, **options, **kept)
        return options["out"]

    return call


def mamba_ssm_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    cu_seqlens: Tensor,
    slots: Tensor,
    has_initial_state: Tensor | None,
    **weights: Any,
) -> Prefill:
    """mamba_ssm's layer has a dense batch, a cache without slots, and copies the last states there."""
    scan = module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    x, dt, B, C = (t.unflatten(0, (len(slots), -1)) for t in (x, dt, B, C))

    def call(cache: Tensor) -> Any:
        rows = cache[1:]
        initial = None if has_initial_state is None else rows
        out, last = scan(x, dt, A, B, C, chunk_size, initial_states=initial, return_final_states=True, **weights)
        rows.copy_(last)
        return out.flatten(0, 1)

    return call


def vllm_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    cu_seqlens: Tensor,
    slots: Tensor,
    has_initial_state: Tensor | None,
) -> Prefill:
    """vLLM has channels first, as a view, and takes a table of programs that is made once for all layers."""
    conv = module(f"{_OPS}.causal_conv1d").causal_conv1d_fn
    block = 8  # tokens of a program, which is not an option of it
    counts = [-(-(stop - start) // block) for start, stop in pairwise(cu_seqlens.tolist())]
    row_of = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], dtype=torch.int32)
    number = torch.tensor([k for count in counts for k in range(count)], dtype=torch.int32)
    programs = {"batch_ptr": row_of.to(x.device), "token_chunk_offset_ptr": number.to(x.device)}
    numbers = {block: {"tot": sum(counts), "mlist": row_of, "mlist_len": sum(counts), "offsetlist": number, **programs}}
    options = {
        "query_start_loc": cu_seqlens,
        "cache_indices": slots,
        "has_initial_state": torch.zeros_like(slots, dtype=torch.bool)
        if has_initial_state is None
        else has_initial_state,
        "metadata": SimpleNamespace(nums_dict=numbers, **programs),
    }
    return lambda cache: conv(x.t(), weight, bias, cache, **options).t()


def cuda_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    cu_seqlens: Tensor,
    slots: Tensor,
    has_initial_state: Tensor | None,
) -> Prefill:
    """causal-conv1d has a dense batch, channels first as a view, and no slots; the last inputs are copied."""
    conv = module("causal_conv1d").causal_conv1d_fn
    batch = x.unflatten(0, (len(slots), -1)).transpose(1, 2)

    def call(cache: Tensor) -> Any:
        rows = cache[1:]
        initial = None if has_initial_state is None else rows
        out, last = conv(batch, weight, bias, initial_states=initial, return_final_states=True, activation="silu")
        rows.copy_(last)
        return out.transpose(1, 2).flatten(0, 1)

    return call


def cuda_conv_packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    cu_seqlens: Tensor,
    slots: Tensor,
    has_initial_state: None,
) -> Prefill:
    """The same kernel over packed sequences: it starts from no state, and a second kernel finds the last inputs."""
    conv = module("causal_conv1d").causal_conv1d_fn
    last_inputs = module("causal_conv1d.causal_conv1d_varlen").causal_conv1d_varlen_states
    rows = torch.arange(len(slots), dtype=torch.int32, device=x.device)
    row_of = rows.repeat_interleave(cu_seqlens.diff()).unsqueeze(0)

    def call(cache: Tensor) -> Any:
        out = conv(x.t().unsqueeze(0), weight, bias, seq_idx=row_of, activation="silu")
        cache[1:].copy_(last_inputs(x, cu_seqlens, cache.shape[-1]))
        return out.squeeze(0).t()

    return call


def cuda_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
    cu_seqlens: Tensor,
    slots: Tensor,
) -> Prefill:
    """mamba_ssm's kernel has a dense batch with a channel's tokens adjacent, as it requires, and no slots."""
    scan = module("selective_scan_cuda").fwd
    x, dt, z, B, C = (t.unflatten(0, (len(slots), -1)).transpose(1, 2).contiguous() for t in (x, dt, z, B, C))
    B, C = B.unsqueeze(1), C.unsqueeze(1)

    def call(cache: Tensor) -> Any:
        _, states, out = scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        cache[1:].copy_(states[:, :, -1, 1::2])
        return out.transpose(1, 2).flatten(0, 1)

    return call


def mamba_ssm_backend(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    z: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    **weights: Any,
) -> Prefill:
    """mamba_ssm's kernel as a backend of our op, from examples/backend_mamba_ssm, with copies of layouts."""
    module("selective_scan_cuda")
    folder = str(Path(__file__).parent.parent / "examples" / "backend_mamba_ssm")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.import_module("mamba_ops_mamba_ssm.backends")
    adapter = mamba_ops.selective_scan.kernels["mamba_ssm"].function
    x, dt, B, C, z = (t.unsqueeze(0) for t in (x, dt, B, C, z))
    out = torch.empty_like(x)

    def call(cache: Tensor) -> Any:
        adapter(x, dt, A, B, C, z=z, ssm_state=cache, slots=slots, output=out, **weights)
        return out[0]

    return call


PREFILL: dict[str, dict[str, Callable[..., Prefill]]] = {
    "mamba_chunk_scan": {"vLLM": vllm_scan, "mamba_ssm": mamba_ssm_scan},
    "selective_scan": {"mamba_ssm": cuda_selective_scan, "mamba_ssm, as our backend": mamba_ssm_backend},
    "causal_conv1d": {"vLLM": vllm_conv, "causal-conv1d": cuda_conv, "causal-conv1d, packed": cuda_conv_packed},
}
"""For every op, its peers: functions of our arguments less the cache. They raise ImportError where a peer is absent."""


def versions() -> dict[str, str]:
    """Which projects are here: name to version."""
    found = {}
    for name, package in {"vLLM": "vllm", "mamba_ssm": "mamba_ssm", "causal-conv1d": "causal_conv1d"}.items():
        try:
            found[name] = getattr(module(package), "__version__", "of no stated version")
        except ImportError as error:
            found[name] = f"absent ({error})"
    return found


# ---- a layer ---------------------------------------------------------------------------------------------------------


def vllm_ops() -> SimpleNamespace:
    """The Triton kernels of vLLM's Mamba-2 layer."""
    conv, ssm = module(f"{_OPS}.causal_conv1d"), module(f"{_OPS}.mamba_ssm")
    return SimpleNamespace(
        conv=conv.causal_conv1d_fn,
        conv_update=conv.causal_conv1d_update,
        update=ssm.selective_state_update,
        scan=module(f"{_OPS}.ssd_combined").mamba_chunk_scan_combined_varlen,
    )
