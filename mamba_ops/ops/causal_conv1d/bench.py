"""What `mamba-ops bench` times of causal_conv1d, and the peers of it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.bench import CHANNELS, LARGE, WIDTH, Build, Call, Case, NotTaken
from mamba_ops.ops.causal_conv1d.op import causal_conv1d

causal_conv1d.bench_host("rows", 1, 64, channels=256)


def case(
    tokens: int,
    sequences: int,
    device: torch.device,
    *,
    carried: bool = False,
    contiguous: bool = False,
    scale: str | None = None,
) -> Case:
    """The convolution of a Mamba-2 layer. Its state is a transposed view, channels contiguous, as engines keep it."""
    dim, make = CHANNELS[scale or bench.scale_of(device)], partial(bench.random, device=device)
    shape = (dim, WIDTH - 1) if contiguous else (WIDTH - 1, dim)
    where = bench.packed(bench.spread(tokens, sequences), device, carried=carried)
    cache = make(1 + sequences, *shape)
    arguments = {"x": make(tokens, dim), "weight": make(dim, WIDTH), "bias": make(dim), **where}
    return Case(
        causal_conv1d,
        bench.of_tokens(tokens, sequences, *["initial states"] * carried, *["contiguous state"] * contiguous),
        arguments,
        {"conv_state": cache if contiguous else cache.transpose(1, 2)},
        make(tokens, dim),
        (where["slots"],),
        reads_caches=carried,
    )


@causal_conv1d.bench_cases
def _cases(scale: str) -> Iterator[Build]:
    if scale != LARGE:
        yield from (partial(case, 256, sequences, scale=scale) for sequences in (1, 4))
        return
    for contiguous in (False, True):
        yield partial(case, 4096, 1, contiguous=contiguous)
        yield partial(case, 16384, 16, contiguous=contiguous)
    yield lambda device: bench.channel_major(case(16384, 16, device), "x")


@causal_conv1d.bench_peer("vLLM")
def _vllm(case: Case, module: Callable[[str], Any]) -> Call:
    """vLLM has channels first, as a view, and takes a table of programs that is made once for all layers."""
    conv = module("vllm.model_executor.layers.mamba.ops.causal_conv1d").causal_conv1d_fn
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

    def call(caches: Mapping[str, Tensor], _: Tensor) -> Any:
        return conv(x.t(), weight, bias, caches["conv_state"], **options).t()

    return call


@causal_conv1d.bench_peer("causal-conv1d")
def _cuda(case: Case, module: Callable[[str], Any]) -> Call:
    """causal-conv1d has a dense batch, channels first as a view, and no slots; the last inputs are copied."""
    conv = module("causal_conv1d").causal_conv1d_fn
    weight, bias, carried = (case.arguments[name] for name in ("weight", "bias", "has_initial_state"))
    batch = case.arguments["x"].unflatten(0, (bench.batched(case), -1)).transpose(1, 2)

    def call(caches: Mapping[str, Tensor], _: Tensor) -> Any:
        states = caches["conv_state"][1:]
        initial = None if carried is None else states
        out, last = conv(batch, weight, bias, initial_states=initial, return_final_states=True, activation="silu")
        states.copy_(last)
        return out.transpose(1, 2).flatten(0, 1)

    return call


@causal_conv1d.bench_peer("causal-conv1d, packed")
def _cuda_packed(case: Case, module: Callable[[str], Any]) -> Call:
    """The same kernel over packed sequences: it starts from no state, and a second kernel finds the last inputs."""
    conv = module("causal_conv1d").causal_conv1d_fn
    last_inputs = module("causal_conv1d.causal_conv1d_varlen").causal_conv1d_varlen_states
    x, weight, bias, cu_seqlens = (case.arguments[name] for name in ("x", "weight", "bias", "cu_seqlens"))
    if case.arguments["has_initial_state"] is not None:
        raise NotTaken("takes no initial states of packed sequences")
    rows = torch.arange(case.rows, dtype=torch.int32, device=x.device)
    row_of = rows.repeat_interleave(cu_seqlens.diff()).unsqueeze(0)

    def call(caches: Mapping[str, Tensor], _: Tensor) -> Any:
        cache = caches["conv_state"]
        out = conv(x.t().unsqueeze(0), weight, bias, seq_idx=row_of, activation="silu")
        cache[1:].copy_(last_inputs(x, cu_seqlens, cache.shape[-1]))
        return out.squeeze(0).t()

    return call
