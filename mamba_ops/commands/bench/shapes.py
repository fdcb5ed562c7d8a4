"""Which cases of every op `mamba-ops bench` measures: large models' on a GPU, smaller ones on a CPU."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from mamba_ops.commands.bench import cases
from mamba_ops.commands.bench.case import Case
from mamba_ops.commands.bench.cases import SMALL
from mamba_ops.registry import ops

Build = Callable[[torch.device], Case]
BF16, F32 = torch.bfloat16, torch.float32


def _large() -> dict[str, list[Build]]:
    scan, chunk_scan, conv, delta_rule = cases.scan, cases.chunk_scan, cases.conv, cases.delta_rule

    def by_channel(device: torch.device) -> Case:
        return cases.channel_major(cases.scan((8192,), device))

    def conv_by_channel(device: torch.device) -> Case:
        return cases.channel_major(cases.conv(16384, 16, device))

    state_update = cases.state_update
    return {
        "selective_scan": [
            *(partial(scan, (tokens,)) for tokens in (512, 2048, 8192)),
            partial(scan, (1024,) * 8, dim=4096),
            by_channel,
        ],
        "mamba_chunk_scan": [partial(chunk_scan, *each) for each in ((4096, 1), (16384, 1), (16384, 16))],
        "chunk_gated_delta_rule": [partial(delta_rule, each) for each in ((4096,), (1024,) * 16)],
        "chunk_kda": [partial(delta_rule, each, by_channel=True) for each in ((4096,), (1024,) * 16)],
        "mamba3_chunk_scan": [partial(cases.mamba3, each) for each in ((4096,), (1024,) * 16)],
        "causal_conv1d": [
            *(partial(conv, *each) for each in ((4096, 1), (16384, 16))),
            *(partial(conv, *each, contiguous=True) for each in ((4096, 1), (16384, 16))),
            conv_by_channel,
        ],
        "causal_conv1d_update": [partial(cases.conv_update, rows) for rows in (1, 64, 256)],
        "selective_state_update": [
            *(partial(state_update, 2, dtype, 1) for dtype in (BF16, F32)),
            *(partial(state_update, 2, BF16, rows) for rows in (64, 256)),
            partial(state_update, 1, BF16, 64),
        ],
        "gated_delta_rule_update": [partial(cases.delta_rule_update, rows) for rows in (1, 64, 256)],
        "kda_update": [partial(cases.delta_rule_update, rows, by_channel=True) for rows in (1, 64)],
        "mamba3_state_update": [partial(cases.mamba3_update, rows) for rows in (1, 64)],
    }


def _small() -> dict[str, list[Build]]:
    lengths = ((256,), (64, 64, 64, 64))
    found: dict[str, list[Callable[..., Case]]] = {
        "selective_scan": [partial(cases.scan, each) for each in lengths],
        "mamba_chunk_scan": [partial(cases.chunk_scan, 256, sequences) for sequences in (1, 4)],
        "chunk_gated_delta_rule": [partial(cases.delta_rule, each) for each in lengths],
        "chunk_kda": [partial(cases.delta_rule, each, by_channel=True) for each in lengths],
        "mamba3_chunk_scan": [partial(cases.mamba3, each) for each in lengths],
        "causal_conv1d": [partial(cases.conv, 256, sequences) for sequences in (1, 4)],
        "causal_conv1d_update": [partial(cases.conv_update, rows) for rows in (1, 16)],
        "selective_state_update": [
            partial(cases.state_update, version, F32, rows) for version in (2, 1) for rows in (1, 16)
        ],
        "gated_delta_rule_update": [partial(cases.delta_rule_update, rows) for rows in (1, 16)],
        "kda_update": [partial(cases.delta_rule_update, rows, by_channel=True) for rows in (1, 16)],
        "mamba3_state_update": [partial(cases.mamba3_update, rows) for rows in (1, 16)],
    }
    return {op: [partial(build, scale=SMALL) for build in builds] for op, builds in found.items()}


def shapes(device: torch.device) -> Mapping[str, list[Build]]:
    """Return what builds each case, by op."""
    return _small() if device.type == "cpu" else _large()


def without() -> Iterator[str]:
    """Yield the ops that are measured in no case: those made of others, those of backwards, and other packages'."""
    yield from sorted(ops().keys() - _small().keys())
