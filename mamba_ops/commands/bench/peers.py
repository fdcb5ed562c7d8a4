"""Kernels of other projects, which ours are compared with: used if they can be imported, never required.

A peer takes one of our cases, arranges its inputs once as its own layers would, and returns the call to time.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ops.commands.bench.case import Call, Case

VLLM = "vllm.model_executor.layers.mamba.ops"
PACKAGES = {
    "vLLM": "vllm",
    "mamba_ssm": "mamba_ssm",
    "causal-conv1d": "causal_conv1d",
    "fla": "fla",
    "FlashInfer": "flashinfer",
}
"""Projects, and the packages that they are imported as."""


class Calls(NamedTuple):
    """A contestant's call as it is checked, caches and all, and as it is timed."""

    checked: Call
    timed: Call


Arrange = Callable[[Case], Call | Calls]
"""Makes a peer's call of a case. It raises ImportError where the peer is absent."""


class NotTaken(ValueError):
    """The peer does not take such a case; the message says what."""


def module(name: str) -> ModuleType:
    """Import a peer's module; those of the folder that MAMBA_OPS_PEERS names come before installed ones.

    Raises:
        ImportError: it is not there, or what it imports is not.
    """
    if folder := os.environ.get("MAMBA_OPS_PEERS"):
        folder = str(Path(folder).resolve())
        if folder not in sys.path:
            sys.path.insert(0, folder)
    return importlib.import_module(name)


def present(known: Mapping[str, Arrange], case: Case) -> tuple[dict[str, Calls], dict[str, Exception]]:
    """Return the calls of those peers that are here and take a case, and of the others why not: an ImportError, a
    NotTaken, or what another version of a peer raises that is not as we know it."""
    found: dict[str, Calls] = {}
    absent: dict[str, Exception] = {}
    for name, arrange in known.items():
        try:
            calls = arrange(case)
        except Exception as error:
            absent[name] = error
        else:
            found[name] = calls if isinstance(calls, Calls) else Calls(calls, calls)
    return found, absent


def versions() -> dict[str, str]:
    """Return which projects are here: name to version."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = str(getattr(module(package), "__version__", "of no stated version"))
        except Exception as error:  # of a library that it loads, say
            sentence, _, _ = str(error).partition("\n")
            found[name] = f"absent ({sentence})"
    return found


# ---- whole sequences: sequence i uses slot i + 1 ---------------------------------------------------------------------


def _batched(case: Case) -> int:
    """Return how many sequences there are, all of one length.

    Raises:
        NotTaken: they differ.
    """
    lengths = set(case.arguments["cu_seqlens"].diff().tolist())
    if len(lengths) > 1:
        raise NotTaken("takes a dense batch, and the sequences differ in length")
    return case.rows


def vllm_scan(case: Case) -> Call:
    """vLLM's layer gathers the initial states, where there are any; its table of chunks is made once for all layers."""
    scan = module(f"{VLLM}.ssd_combined").mamba_chunk_scan_combined_varlen
    gather = module(f"{VLLM}.gather_initial_states").gather_initial_states
    given = dict(case.arguments)
    x, dt, A, B, C, chunk_size = (given.pop(name) for name in ("x", "dt", "A", "B", "C", "chunk_size"))
    cu_seqlens, slots, carried = (given.pop(name) for name in ("cu_seqlens", "slots", "has_initial_state"))
    ends, row_of, last = [0], [], []
    for row, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        new = [*range(start + chunk_size, stop, chunk_size), stop]
        ends += new
        row_of += [row] * len(new)
        last.append(len(row_of) - 1)
    table = {"cu_chunk_seqlens": ends, "seq_idx": row_of, "last_chunk_indices": last}
    options = {key: torch.tensor(value, dtype=torch.int32, device=x.device) for key, value in table.items()}
    options |= given | {"cu_seqlens": cu_seqlens, "out": x.new_empty(x.shape), "final_state_indices": slots}

    def call(caches: Mapping[str, Tensor], _: Tensor) -> Tensor:
        cache = caches["ssm_state"]
        initial = None if carried is None else gather(cache, slots, carried)
        kept = {"initial_states": initial, "final_states_out": cache, "state_dtype": cache.dtype}
        scan(x, dt, A, B, C, chunk_size, **options, **kept)
        out: Tensor = options["out"]
        return out

    return call


def mamba_ssm_scan(case: Case) -> Call:
    """mamba_ssm's layer has a dense batch, a cache without slots, and copies the last states there."""
    scan = module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    rows, given = _batched(case), dict(case.arguments)
    x, dt, B, C = (given.pop(name).unflatten(0, (rows, -1)) for name in ("x", "dt", "B", "C"))
    A, chunk_size, carried = (given.pop(name) for name in ("A", "chunk_size", "has_initial_state"))
    weights = {name: value for name, value in given.items() if name not in ("cu_seqlens", "slots")}

    def call(caches: Mapping[str, Tensor], _: Tensor) -> Tensor:
        states = caches["ssm_state"][1:]
        initial = None if carried is None else states
        out, last = scan(x, dt, A, B, C, chunk_size, initial_states=initial, return_final_states=True, **weights)
        states.copy_(last)
        found: Tensor = out.flatten(0, 1)
        return found

    return call


def vllm_conv(case: Case) -> Call:
    """vLLM has channels first, as a view, and takes a table of programs that is made once for all layers."""
    conv = module(f"{VLLM}.causal_conv1d").causal_conv1d_fn
    x, weight, bias, cu_seqlens, slots = (case.arguments[n] for n in ("x", "weight", "bias", "cu_seqlens", "slots"))
    carried = case.arguments["has_initial_state"]
    block = 8  # tokens of a program, which is not an option of it
    counts = [-(-(stop - start) // block) for start, stop in pairwise(cu_seqlens.tolist())]
    row_of = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], dtype=torch.int32)
    number = torch.tensor([k for count in counts for k in range(count)], dtype=torch.int32)
    programs = {"batch_ptr": row_of.to(x.device), "token_chunk_offset_ptr": number.to(x.device)}
    numbers = {block: {"tot": sum(counts), "mlist": row_of, "mlist_len": sum(counts), "offsetlist": number, **programs}}
    options = {
        "query_start_loc": cu_seqlens,
        "cache_indices": slots,
        "has_initial_state": torch.zeros_like(slots, dtype=torch.bool) if carried is None else carried,
        "metadata": SimpleNamespace(nums_dict=numbers, **programs),
    }

    def call(caches: Mapping[str, Tensor], _: Tensor) -> Tensor:
        out: Tensor = conv(x.t(), weight, bias, caches["conv_state"], **options).t()
        return out

    return call


def cuda_conv(case: Case) -> Call:
    """causal-conv1d has a dense batch, channels first as a view, and no slots; the last inputs are copied."""
    conv = module("causal_conv1d").causal_conv1d_fn
    weight, bias, carried = (case.arguments[name] for name in ("weight", "bias", "has_initial_state"))
    batch = case.arguments["x"].unflatten(0, (_batched(case), -1)).transpose(1, 2)

    def call(caches: Mapping[str, Tensor], _: Tensor) -> Tensor:
        states = caches["conv_state"][1:]
        initial = None if carried is None else states
        out, last = conv(batch, weight, bias, initial_states=initial, return_final_states=True, activation="silu")
        states.copy_(last)
        found: Tensor = out.transpose(1, 2).flatten(0, 1)
        return found

    return call


def cuda_conv_packed(case: Case) -> Call:
    """The same kernel over packed sequences: it starts from no state, and a second kernel finds the last inputs."""
    conv = module("causal_conv1d").causal_conv1d_fn
    last_inputs = module("causal_conv1d.causal_conv1d_varlen").causal_conv1d_varlen_states
    x, weight, bias, cu_seqlens = (case.arguments[name] for name in ("x", "weight", "bias", "cu_seqlens"))
    if case.arguments["has_initial_state"] is not None:
        raise NotTaken("takes no initial states of packed sequences")
    rows = torch.arange(case.rows, dtype=torch.int32, device=x.device)
    row_of = rows.repeat_interleave(cu_seqlens.diff()).unsqueeze(0)

    def call(caches: Mapping[str, Tensor], _: Tensor) -> Tensor:
        cache = caches["conv_state"]
        out = conv(x.t().unsqueeze(0), weight, bias, seq_idx=row_of, activation="silu")
        cache[1:].copy_(last_inputs(x, cu_seqlens, cache.shape[-1]))
        found: Tensor = out.squeeze(0).t()
        return found

    return call


def cuda_selective_scan(case: Case) -> Call:
    """mamba_ssm's kernel has a dense batch with a channel's tokens adjacent, as it requires, and no slots."""
    scan = module("selective_scan_cuda").fwd
    rows, given = _batched(case), case.arguments
    x, dt, z, B, C = (
        given[n].unflatten(0, (rows, -1)).transpose(1, 2).contiguous() for n in ("x", "dt", "z", "B", "C")
    )
    A, D, dt_bias, softplus = (given[name] for name in ("A", "D", "dt_bias", "dt_softplus"))
    B, C = B.unsqueeze(1), C.unsqueeze(1)

    def call(caches: Mapping[str, Tensor], _: Tensor) -> Tensor:
        _, states, out = scan(x, dt, A, B, C, D, z, dt_bias, softplus)
        caches["ssm_state"][1:].copy_(states[:, :, -1, 1::2])
        found: Tensor = out.transpose(1, 2).flatten(0, 1)
        return found

    return call


def fla(case: Case) -> Calls:
    """fla's kernel as its layers call it: once with a copy of our states, for errors, and once bare, for times.

    Its states are (k_dim, v_dim) and have no slots; q, k and v are made contiguous, and the gates of decode computed,
    before the clock starts.
    """
    by_channel, given, many = "kda" in case.op, case.arguments, case.op.startswith("chunk")
    name = "kda" if by_channel else "gated_delta_rule"
    function = getattr(module(f"fla.ops.{name}"), f"chunk_{name}" if many else f"fused_recurrent_{name}")
    options, axis = ({"cu_seqlens": given["cu_seqlens"].long()}, 0) if many else ({}, 1)
    if many:
        g, beta = given["g"], given["beta"]
    else:
        steps = torch.nn.functional.softplus(given["a"].float() + given["dt_bias"])
        g, beta = -given["A_log"].exp().view(-1, *[1] * (steps.dim() - 2)) * steps, given["b"].sigmoid()
    tensors = {"q": given["q"], "k": given["k"], "v": given["v"], "g": g, "beta": beta}
    options |= {name: tensor.contiguous().unsqueeze(axis) for name, tensor in tensors.items()}
    options |= {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    starts = {
        table.data_ptr(): case.cache[table.long()].mT.contiguous() for table in case.tables
    }  # as cold as slots are

    def checked(caches: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        cache, rows = caches["ssm_state"], slots.long()
        out, last = function(initial_state=cache[rows].mT.contiguous(), **options)
        cache[rows] = last.mT.to(cache.dtype)
        found: Tensor = out.squeeze(axis)
        return found

    def timed(_: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        out: Tensor = function(initial_state=starts[slots.data_ptr()], **options)[0]
        return out

    return Calls(checked, timed)


# ---- one token for every row -----------------------------------------------------------------------------------------


def _tied(case: Case) -> dict[str, Tensor]:
    """Return the arguments of selective_state_update that ours has one of per head, as others recognise the same: by
    strides of 0."""
    given = {name: case.arguments[name] for name in ("dt", "A", "D", "dt_bias")}
    x, dstate = case.arguments["x"], case.arguments["B"].shape[-1]
    if x.dim() == 3:
        dim = x.shape[-1]
        given |= {n: given[n][..., None].expand(*given[n].shape, dim) for n in ("dt", "D", "dt_bias")}
        given["A"] = given["A"][:, None, None].expand(-1, dim, dstate)
    return given


def _triton_state_update(case: Case, *, of: str, has_out: bool) -> Call:
    """The kernel that vLLM and mamba_ssm share by origin."""
    kernel, given = module(of).selective_state_update, {**case.arguments, **_tied(case)}
    x, dt, A, B, C = (given[name] for name in ("x", "dt", "A", "B", "C"))
    options = {name: given.get(name) for name in ("D", "z", "dt_bias", "dt_softplus")}
    options |= {"out": case.out} if has_out else {}

    def call(caches: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        out = kernel(caches["ssm_state"], x, dt, A, B, C, state_batch_indices=slots, **options)
        return case.out if has_out else out

    return call


vllm_state_update = functools.partial(_triton_state_update, of=f"{VLLM}.mamba_ssm", has_out=True)
mamba_ssm_state_update = functools.partial(
    _triton_state_update, of="mamba_ssm.ops.triton.selective_state_update", has_out=False
)


def flashinfer_state_update(case: Case) -> Call:
    """FlashInfer's kernel on views that are made before the clock starts."""
    kernel = module("flashinfer.mamba").selective_state_update
    given = {**case.arguments, **_tied(case)}
    if given["x"].dim() != 3:
        raise NotTaken("takes the state of Mamba-2 alone")
    x, dt, A, B, C, D = (given[name] for name in ("x", "dt", "A", "B", "C", "D"))
    options = {"dt_bias": given["dt_bias"], "dt_softplus": given["dt_softplus"], "out": case.out}

    def call(caches: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        kernel(caches["ssm_state"], x, dt, A, B, C, D, state_batch_indices=slots, **options)
        return case.out

    return call


def flashinfer_kda_update(case: Case) -> Call:
    """FlashInfer's decode; q, k and v are made contiguous before the clock starts."""
    kernel, given = module("flashinfer.kda").recurrent_kda, case.arguments
    if case.cache.dtype != torch.bfloat16:
        raise NotTaken("takes a bfloat16 state")
    tensors = [given[name].contiguous().unsqueeze(0) for name in ("q", "k", "v", "a", "b")]
    ends = torch.arange(case.rows + 1, dtype=torch.int32, device=case.out.device)
    options = {"A_log": given["A_log"], "dt_bias": given["dt_bias"].flatten(), "use_gate_in_kernel": True}
    options |= {"cu_seqlens": ends, "output": case.out.unsqueeze(0), "beta_is_logit": True, "backend": "cute-dsl"}

    def call(caches: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        kernel(*tensors, initial_state=caches["ssm_state"], ssm_state_indices=slots, **options)
        return case.out

    return call


def flashinfer_kda(case: Case) -> Calls:
    """cuDNN's prefill, by FlashInfer: once with a copy of our states, for errors, and once bare, for times."""
    kernel, given = module("flashinfer.cudnn").cudnn_recurrent_kda, case.arguments
    tensors = [given[name].contiguous() for name in ("q", "k", "v", "g")] + [given["beta"].float()]
    starts, ends = case.cache[case.tables[0].long()].float(), given["cu_seqlens"]
    last = torch.empty_like(starts)
    options = {"cu_seqlens": ends, "output": case.out, "output_state": last, "output_final_state": True}

    def timed(_: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        kernel(*tensors, initial_state=starts, **options)
        return case.out

    def checked(caches: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        timed(caches, slots)
        caches["ssm_state"][slots.long()] = last.to(case.cache.dtype)
        return case.out

    return Calls(checked, timed)


def _conv_update(case: Case, *, of: str, has_out: bool) -> Call:
    """The kernel of vLLM, or of causal-conv1d, which share their signatures."""
    kernel = module(of).causal_conv1d_update
    x, weight, bias = (case.arguments[name] for name in ("x", "weight", "bias"))
    options = {"activation": "silu"} | ({"out": case.out} if has_out else {})

    def call(caches: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        out = kernel(x, caches["conv_state"], weight, bias, conv_state_indices=slots, **options)
        return case.out if has_out else out

    return call


vllm_conv_update = functools.partial(_conv_update, of=f"{VLLM}.causal_conv1d", has_out=True)
cuda_conv_update = functools.partial(_conv_update, of="causal_conv1d", has_out=False)


PEERS: dict[str, dict[str, Arrange]] = {
    "mamba_chunk_scan": {"vLLM": vllm_scan, "mamba_ssm": mamba_ssm_scan},
    "selective_scan": {"mamba_ssm": cuda_selective_scan},
    "causal_conv1d": {"vLLM": vllm_conv, "causal-conv1d": cuda_conv, "causal-conv1d, packed": cuda_conv_packed},
    "chunk_gated_delta_rule": {"fla": fla},
    "chunk_kda": {"fla": fla, "FlashInfer": flashinfer_kda},
    "selective_state_update": {
        "vLLM": vllm_state_update,
        "mamba_ssm": mamba_ssm_state_update,
        "FlashInfer": flashinfer_state_update,
    },
    "causal_conv1d_update": {"vLLM": vllm_conv_update, "causal-conv1d": cuda_conv_update},
    "gated_delta_rule_update": {"fla": fla},
    "kda_update": {"fla": fla, "FlashInfer": flashinfer_kda_update},
}
"""For every op, its peers by name."""
