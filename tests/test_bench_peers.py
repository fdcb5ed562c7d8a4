"""What `mamba-ops bench` calls of peers, with our functions of their names in their place."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from mamba_ops.commands.bench import peers, run
from mamba_ops.compat import causal_conv1d as of_causal_conv1d
from mamba_ops.compat import fla as of_fla
from mamba_ops.compat import mamba_ssm as of_mamba_ssm
from mamba_ops.compat import vllm as of_vllm
from mamba_ops.ops._common.bench import Calls, Case, NotTaken, batched
from mamba_ops.ops.causal_conv1d.bench import case as conv
from mamba_ops.ops.causal_conv1d_update.bench import case as conv_update
from mamba_ops.ops.chunk_gated_delta_rule.bench import case as chunk_gated_delta_rule
from mamba_ops.ops.chunk_kda.bench import case as chunk_kda
from mamba_ops.ops.gated_delta_rule_update.bench import case as gated_delta_rule_update
from mamba_ops.ops.kda_update.bench import case as kda_update
from mamba_ops.ops.mamba_chunk_scan.bench import case as chunk_scan
from mamba_ops.ops.selective_scan.bench import case as scan
from mamba_ops.ops.selective_state_update.bench import case as state_update
from tests.mamba_ssm_stand_ins import selective_scan_cuda

CPU = torch.device("cpu")
VLLM = "vllm.model_executor.layers.mamba.ops"


class _Gathers(ModuleType):
    @staticmethod
    def gather_initial_states(cache: torch.Tensor, slots: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
        return torch.where(carried[:, None, None, None], cache[slots.long()], 0)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = {
        "causal_conv1d": of_causal_conv1d,
        "causal_conv1d.causal_conv1d_varlen": of_causal_conv1d,
        "fla.ops.gated_delta_rule": of_fla,
        "fla.ops.kda": of_fla,
        "mamba_ssm.ops.triton.ssd_combined": of_mamba_ssm,
        "mamba_ssm.ops.triton.selective_state_update": of_mamba_ssm,
        "selective_scan_cuda": selective_scan_cuda,
        f"{VLLM}.ssd_combined": of_vllm,
        f"{VLLM}.gather_initial_states": _Gathers("gathers"),
        f"{VLLM}.causal_conv1d": of_vllm,
        f"{VLLM}.mamba_ssm": of_vllm,
    }
    monkeypatch.setattr(peers, "module", lambda name: modules[name])


TINIES: list[Callable[[], Case]] = [
    lambda: scan((5, 5), CPU),
    lambda: chunk_scan(40, 2, CPU),
    lambda: chunk_scan(40, 2, CPU, carried=True),
    lambda: conv(40, 2, CPU),
    lambda: conv(40, 2, CPU, carried=True),
    lambda: chunk_gated_delta_rule((20, 20), CPU),
    lambda: chunk_kda((20, 3), CPU),
    lambda: state_update(2, torch.float32, 3, CPU),
    lambda: state_update(1, torch.float32, 3, CPU),
    lambda: conv_update(3, CPU),
    lambda: gated_delta_rule_update(3, CPU),
    lambda: kda_update(3, CPU),
]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("build", TINIES, ids=lambda build: f"{(c := build()).op.name}, {c.name}")
def test_peers_get_the_same_numbers(build: Callable[[], Case]) -> None:
    """Each peer's call of a case gives what the reference does, output and states: arguments are in their places."""
    torch.manual_seed(0)
    case = build()
    known = {name: arrange for name, arrange in peers.of(case.op).items() if name != "FlashInfer"}
    assert known
    refused = set()
    with torch.no_grad():
        for name, arrange in known.items():
            try:
                arranged = arrange(case)
            except NotTaken:
                refused.add(name)
                continue
            calls = arranged if isinstance(arranged, Calls) else Calls(arranged, arranged)
            found = run.check(case, calls.checked, case.expected(), runs=1)
            assert found.error < 1e-5, (name, found.error)
            assert found.kept
            assert calls.timed(case.caches, case.tables[0]) is not None
    assert refused == (
        {"causal-conv1d, packed"} if case.op.name == "causal_conv1d" and "states" in case.name else set()
    )


def test_a_dense_batch_is_not_taken_of_sequences_that_differ() -> None:
    with pytest.raises(NotTaken, match="the sequences differ in length"):
        batched(scan((5, 4), CPU))
