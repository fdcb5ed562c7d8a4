"""What `mamba-ops bench` times of causal_conv1d_update, and the peers of it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.bench import CHANNELS, WIDTH, Call, Case
from mamba_ops.ops.causal_conv1d_update.op import causal_conv1d_update

causal_conv1d_update.bench_host("one token", 4, 1, channels=256)


def case(rows: int, device: torch.device, *, scale: str | None = None) -> Case:
    """The convolution of a Mamba-2 layer. Its state is a transposed view, channels contiguous, as engines keep it."""
    dim, make = CHANNELS[scale or bench.scale_of(device)], partial(bench.random, device=device)
    x = make(rows, dim)
    slots, tables = bench.slot_tables(rows, dim * (WIDTH - 1) * x.element_size(), device)
    arguments = {"x": x, "weight": make(dim, WIDTH), "bias": make(dim), "slots": tables[0]}
    caches = {"conv_state": make(slots, WIDTH - 1, dim).transpose(1, 2)}
    return Case(causal_conv1d_update, bench.of_rows(rows), arguments, caches, torch.empty_like(x), tables)


causal_conv1d_update.bench_cases(bench.by_scale(case, large=((1,), (64,), (256,)), small=((1,), (16,))))


def _shared(case: Case, module: Callable[[str], Any], *, of: str, has_out: bool) -> Call:
    """The kernel of vLLM, or of causal-conv1d, which share their signatures."""
    kernel = module(of).causal_conv1d_update
    x, weight, bias = (case.arguments[name] for name in ("x", "weight", "bias"))
    options = {"activation": "silu"} | ({"out": case.out} if has_out else {})

    def call(caches: Mapping[str, Tensor], slots: Tensor) -> Any:
        out = kernel(x, caches["conv_state"], weight, bias, conv_state_indices=slots, **options)
        return case.out if has_out else out

    return call


VLLM = "vllm.model_executor.layers.mamba.ops.causal_conv1d"
causal_conv1d_update.bench_peer("vLLM")(partial(_shared, of=VLLM, has_out=True))
causal_conv1d_update.bench_peer("causal-conv1d")(partial(_shared, of="causal_conv1d", has_out=False))
