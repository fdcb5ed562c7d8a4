"""Layers under torch.compile: one graph to prefill with, one to decode with; and so for Transformers' own model."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from mamba_ops import absent
from mamba_ops.compat.transformers import use_mamba_ops
from mamba_ops.layers import Mamba2
from tests.conftest import ACCELERATOR

DEVICE = ACCELERATOR or torch.device("cpu")
ABSENT = [d for d in ("cuda", "xpu") if d != DEVICE.type]
HIDDEN = 24

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "_no_grad")


@pytest.fixture
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def new_layer() -> Mamba2:
    return Mamba2(HIDDEN, heads=6, head_dim=8, dstate=16, groups=2, chunk_size=32).to(DEVICE)


@pytest.fixture
def layer() -> Mamba2:
    return new_layer()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def same(
    call: Callable[..., Tensor], compiled: Callable[..., Tensor], hidden: Tensor, *caches: Tensor, **rows: Any
) -> None:
    """Compiled and eager agree in what they return and in what they leave in the caches."""
    copies = [cache.clone() for cache in caches]
    torch.testing.assert_close(compiled(hidden, *copies, **rows), call(hidden, *caches, **rows))
    torch.testing.assert_close(copies, list(caches))


def caches_of(layer: Mamba2, slots: int) -> list[Tensor]:
    return [torch.randn_like(cache) for cache in layer.empty_caches(slots)]


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_prefill_without_caches_is_one_graph(layer: Mamba2, backend: str) -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for batch, length in ((5, 37), (2, 2), (3, 300), (64, 7), (2, 4096)):
        same(layer, compiled, torch.randn(batch, length, HIDDEN, device=DEVICE))
    assert graphs() == 1


def test_prefill_into_slots_is_one_graph(layer: Mamba2) -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((5, 37), (2, 300), (64, 7), (17, 2)):
        hidden = torch.randn(batch, length, HIDDEN, device=DEVICE)
        slots = torch.randperm(2 * batch + 1, device=DEVICE)[:batch]
        going_on = torch.arange(batch, device=DEVICE) % 2 == 0
        same(layer, compiled, hidden, *caches_of(layer, 2 * batch + 1), slots=slots, has_initial_state=going_on)
    assert graphs() == 1


def test_packed_prefill_is_one_graph(layer: Mamba2) -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((5, 9, 17), (30, 1), (2,) * 40):
        ends = torch.tensor((0, *lengths), device=DEVICE).cumsum(0)
        hidden = torch.randn(sum(lengths), HIDDEN, device=DEVICE)
        same(layer, compiled, hidden, *caches_of(layer, 3 * len(lengths)), cu_seqlens=ends)
    assert graphs() == 1


@pytest.mark.parametrize("tokens", [(), (3,)], ids=["one token", "a few tokens"])
def test_decoding_is_one_graph(layer: Mamba2, tokens: tuple[int, ...]) -> None:
    compiled = torch.compile(layer.step, fullgraph=True, dynamic=True)
    for rows in (5, *range(2, 65)):
        hidden = torch.randn(rows, *tokens, HIDDEN, device=DEVICE)
        same(layer.step, compiled, hidden, *caches_of(layer, 3 * rows + 2), slots=torch.arange(rows, device=DEVICE) + 1)
    assert graphs() == 1


def test_decoding_copies_no_cache(layer: Mamba2) -> None:
    """Nor does the check of the caches leave anything in the code."""
    compiled = torch.compile(layer.step, fullgraph=True, dynamic=True)
    with torch._inductor.config.patch(fx_graph_cache=False):  # code from the cache is not written again
        _, [code] = run_and_get_code(compiled, torch.randn(5, HIDDEN, device=DEVICE), *caches_of(layer, 5))
    called = code[code.index("def call(") :]
    ours = [
        line.split("(")[0].strip() for line in called.splitlines() if line.strip().startswith("torch.ops.mamba_ops")
    ]
    assert [name.split(".")[3] for name in ours] == ["causal_conv1d_update", "selective_state_update"]
    assert not any(word in called for word in ("copy_(", "clone("))


# -- Transformers' own model ------------------------------------------------------------------------------------------


def transformers_model() -> Any:
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 16}
    config = modeling.Mamba2Config(**sizes, vocab_size=64, num_hidden_layers=2)
    return modeling.Mamba2ForCausalLM(config).eval().to(DEVICE)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_transformers_reads_prompts_in_one_graph(backend: str) -> None:
    model = transformers_model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with use_mamba_ops(model):
        for batch, length in ((2, 21), (5, 13), (3, 34), (7, 200)):
            tokens = torch.randint(64, (batch, length), device=DEVICE)
            expected = model(tokens, use_cache=False).logits
            torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)
    assert graphs() == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_transformers_decodes_in_one_graph(backend: str) -> None:
    """Token by token on a cache, as on the whole text at once. Without the binding it is stock's graph again."""
    model = transformers_model()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    tokens = torch.randint(64, (3, 19), device=DEVICE)
    with use_mamba_ops(model):
        expected = model(tokens, use_cache=False).logits
        cache = model(tokens[:, :7], use_cache=True).cache_params
        for t in range(7, 19):
            logits = compiled(tokens[:, t : t + 1].contiguous(), cache_params=cache, use_cache=True).logits
            torch.testing.assert_close(logits[:, 0], expected[:, t])
        assert graphs() == 1
    compiled(tokens[:, :1].contiguous(), cache_params=cache, use_cache=True)
    assert graphs() == 2


# -- devices that are not there ---------------------------------------------------------------------------------------


class _Steps(torch.nn.Module):
    """A layer's `step` as a module's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = new_layer()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.layer.step(*args, **kwargs)


def traced(*, device: str) -> dict[str, Any]:
    """In a child process: prefill and decode over three batches each."""
    found = {}
    for name, module, length in (("prefill", new_layer(), [37]), ("decode", _Steps(), [])):
        tracer = absent.Tracer(module, device=device, dynamic=True)
        for rows in (5, 7, 11):
            out = tracer(torch.randn(rows, *length, HIDDEN), *new_layer().empty_caches(rows))
        found[name] = dataclasses.asdict(tracer.trace) | {"out": [out.device.type, list(out.shape)]}
    return found


@pytest.mark.parametrize("device", ABSENT)
def test_each_is_one_graph_for_an_absent_device(device: str) -> None:
    expected = {"prefill": ["causal_conv1d", "mamba_chunk_scan"]}
    expected["decode"] = ["causal_conv1d_update", "selective_state_update"]
    for name, trace in absent.run("compile_tests.test_layers:traced", device=device).items():
        assert trace["out"][0] == device
        assert trace["out"][1][-1] == HIDDEN
        assert not trace["breaks"]
        assert not trace["recompiles"]
        [graph] = trace["graphs"]
        ours = [op.split(".")[1] for op in graph["ops"] if op.startswith("mamba_ops.")]
        assert ours == expected[name]
