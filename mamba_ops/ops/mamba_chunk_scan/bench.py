"""What `mamba-ops bench` times of mamba_chunk_scan, and the peers of it."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.bench import MAMBA2, Call, Case
from mamba_ops.ops.mamba_chunk_scan.op import mamba_chunk_scan

mamba_chunk_scan.bench_host("rows", 1, 64, heads=8, dim=64, dstate=128, groups=1, chunk_size=64)


def case(tokens: int, sequences: int, device: torch.device, *, carried: bool = False, scale: str | None = None) -> Case:
    """The scan of a Mamba-2 layer; x, B and C are views of one tensor, as the convolution leaves them."""
    heads, dim, dstate, groups, chunk_size = MAMBA2[scale or bench.scale_of(device)]
    make, of_group = partial(bench.random, device=device), groups * dstate
    x, B, C = make(tokens, heads * dim + 2 * of_group).split([heads * dim, of_group, of_group], dim=1)
    where = bench.packed(bench.spread(tokens, sequences), device, carried=carried)
    arguments = {
        "x": x.unflatten(1, (heads, dim)),
        "dt": make(tokens, heads),
        "A": -1 - 15 * torch.rand(heads, device=device),
        "B": B.unflatten(1, (groups, dstate)),
        "C": C.unflatten(1, (groups, dstate)),
        "D": make(heads),
        "dt_bias": make(heads) - 3,
        **where,
        "chunk_size": chunk_size,
        "dt_softplus": True,
    }
    return Case(
        mamba_chunk_scan,
        bench.of_tokens(tokens, sequences, *["initial states"] * carried),
        arguments,
        {"ssm_state": make(1 + sequences, heads, dim, dstate)},
        make(tokens, heads, dim),
        (where["slots"],),
        reads_caches=carried,
        products=4 * tokens * heads * dim * dstate,  # into the state, and out of it
    )


LARGE, SMALL = [(4096, 1), (16384, 1), (16384, 16)], [(256, 1), (256, 4)]
mamba_chunk_scan.bench_cases(bench.by_scale(case, large=LARGE, small=SMALL))


@mamba_chunk_scan.bench_peer("vLLM")
def _vllm(case: Case, module: Callable[[str], Any]) -> Call:
    """vLLM's layer gathers the initial states, where there are any; its table of chunks is made once for all layers."""
    ops = "vllm.model_executor.layers.mamba.ops"
    scan = module(f"{ops}.ssd_combined").mamba_chunk_scan_combined_varlen
    gather = module(f"{ops}.gather_initial_states").gather_initial_states
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

    def call(caches: Mapping[str, Tensor], _: Tensor) -> Any:
        cache = caches["ssm_state"]
        initial = None if carried is None else gather(cache, slots, carried)
        kept = {"initial_states": initial, "final_states_out": cache, "state_dtype": cache.dtype}
        scan(x, dt, A, B, C, chunk_size, **options, **kept)
        return options["out"]

    return call


@mamba_chunk_scan.bench_peer("mamba_ssm")
def _mamba_ssm(case: Case, module: Callable[[str], Any]) -> Call:
    """mamba_ssm's layer has a dense batch, a cache without slots, and copies the last states there."""
    scan = module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    rows, given = bench.batched(case), dict(case.arguments)
    x, dt, B, C = (given.pop(name).unflatten(0, (rows, -1)) for name in ("x", "dt", "B", "C"))
    A, chunk_size, carried = (given.pop(name) for name in ("A", "chunk_size", "has_initial_state"))
    weights = {name: value for name, value in given.items() if name not in ("cu_seqlens", "slots")}

    def call(caches: Mapping[str, Tensor], _: Tensor) -> Any:
        states = caches["ssm_state"][1:]
        initial = None if carried is None else states
        out, last = scan(x, dt, A, B, C, chunk_size, initial_states=initial, return_final_states=True, **weights)
        states.copy_(last)
        return out.flatten(0, 1)

    return call
