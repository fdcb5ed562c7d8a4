"""Layers under torch.compile: one graph to prefill with, one to decode with; and so for Transformers' own model."""

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from mamba_ops.audit import absent
from mamba_ops.compat.transformers import cache_of, use_mamba_ops
from tests.conftest import ABSENT, ACCELERATOR
from tests.layers import HIDDEN, KINDS
from tests.layers import new_layer as new_layer_on
from tests.transformers_models import VOCABULARY, new_model

DEVICE = ACCELERATOR or torch.device("cpu")
FAMILIES = ("mamba", "falcon_mamba", "mamba2", "qwen3_next") if find_spec("transformers") else ()

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def layer(name: str) -> Any:
    return new_layer_on(name, DEVICE)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def same(
    call: Callable[..., Tensor], compiled: Callable[..., Tensor], hidden: Tensor, *caches: Tensor, **rows: Any
) -> None:
    """Compiled and eager agree in what they return and in what they leave in the caches."""
    copies = [cache.clone() for cache in caches]
    torch.testing.assert_close(compiled(hidden, *copies, **rows), call(hidden, *caches, **rows))
    torch.testing.assert_close(copies, list(caches))


def caches_of(layer: Any, slots: int) -> list[Tensor]:
    return [torch.randn_like(cache) for cache in layer.empty_caches(slots)]


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_prefill_without_caches_is_one_graph(layer: Any, backend: str) -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for batch, length in ((5, 37), (2, 2), (3, 300), (64, 7), (2, 4096)):
        same(layer, compiled, torch.randn(batch, length, HIDDEN, device=DEVICE))
    assert graphs() == 1


def test_prefill_into_slots_is_one_graph(layer: Any) -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((5, 37), (2, 300), (64, 7), (17, 2)):
        hidden = torch.randn(batch, length, HIDDEN, device=DEVICE)
        slots = torch.randperm(2 * batch + 1, device=DEVICE)[:batch]
        going_on = torch.arange(batch, device=DEVICE) % 2 == 0
        same(layer, compiled, hidden, *caches_of(layer, 2 * batch + 1), slots=slots, has_initial_state=going_on)
    assert graphs() == 1


def test_packed_prefill_is_one_graph(layer: Any) -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((5, 9, 17, 2, 6), (30, 1), (2,) * 40):
        ends = torch.tensor((0, *lengths), device=DEVICE).cumsum(0)
        hidden = torch.randn(sum(lengths), HIDDEN, device=DEVICE)
        same(layer, compiled, hidden, *caches_of(layer, 3 * len(lengths) + 2), cu_seqlens=ends)
    assert graphs() == 1


@pytest.mark.parametrize("tokens", [(), (3,)], ids=["one token", "a few tokens"])
def test_decoding_is_one_graph(layer: Any, tokens: tuple[int, ...]) -> None:
    compiled = torch.compile(layer.step, fullgraph=True, dynamic=True)
    for rows in (5, *range(2, 65)):
        hidden = torch.randn(rows, *tokens, HIDDEN, device=DEVICE)
        same(layer.step, compiled, hidden, *caches_of(layer, 3 * rows + 2), slots=torch.arange(rows, device=DEVICE) + 1)
    assert graphs() == 1


def test_decoding_copies_no_cache(name: str, layer: Any) -> None:
    """Nor does the check of the caches leave anything in the code."""
    compiled = torch.compile(layer.step, fullgraph=True, dynamic=True)
    with torch._inductor.config.patch(fx_graph_cache=False):  # code from the cache is not written again
        _, [code] = run_and_get_code(compiled, torch.randn(5, HIDDEN, device=DEVICE), *caches_of(layer, 5))
    called = code[code.index("def call(") :]
    ours = [
        line.split("(")[0].strip() for line in called.splitlines() if line.strip().startswith("torch.ops.mamba_ops")
    ]
    assert [op.split(".")[3] for op in ours] == KINDS[name].decode
    assert not any(word in called for word in ("copy_(", "clone("))


# -- Transformers' own model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow if f in ("mamba", "qwen3_next") else ()) for f in FAMILIES]
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_transformers_reads_prompts_in_one_graph(family: str, backend: str) -> None:
    model = new_model(family, DEVICE)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with use_mamba_ops(model):
        for batch, length in ((2, 21), (5, 13), (3, 34), (7, 200)):
            tokens = torch.randint(VOCABULARY, (batch, length), device=DEVICE)
            expected = model(tokens, use_cache=False).logits
            torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)
    assert graphs() == 1


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in ("falcon_mamba", "mamba2", "qwen3_next") else pytest.mark.slow)
        for name in FAMILIES
    ],
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_transformers_decodes_in_one_graph(family: str, backend: str) -> None:
    """Token by token on a cache, as on the whole text at once. Without the binding it is stock's graph again."""
    model = new_model(family, DEVICE)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    tokens = torch.randint(VOCABULARY, (3, 19), device=DEVICE)
    with use_mamba_ops(model):
        expected = model(tokens, use_cache=False).logits
        out = model(tokens[:, :7], use_cache=True)
        cache = cache_of(out)
        for t in range(7, 19):
            logits = compiled(tokens[:, t : t + 1].contiguous(), **cache, use_cache=True).logits
            torch.testing.assert_close(logits[:, 0], expected[:, t])
        assert graphs() == 1
    compiled(tokens[:, :1].contiguous(), **cache, use_cache=True)
    assert graphs() == 2


# -- devices that are not there ---------------------------------------------------------------------------------------


class _Steps(torch.nn.Module):
    """A layer's `step` as a module's forward."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        out: Tensor = self.layer.step(*args, **kwargs)
        return out


def traced(*, device: str) -> dict[str, Any]:
    """In a child process: prefill and decode of every layer over three batches each."""
    found: dict[str, Any] = {}
    for name in KINDS:
        layer = new_layer_on(name, "cpu")
        for mode, module, length in (("prefill", layer, [37]), ("decode", _Steps(layer), [])):
            tracer = absent.Tracer(module, device=device, dynamic=True)
            for rows in (5, 7, 11):
                out = tracer(torch.randn(rows, *length, HIDDEN), *new_layer_on(name, "cpu").empty_caches(rows))
            trace = dataclasses.asdict(tracer.trace) | {"out": [out.device.type, list(out.shape)]}
            found.setdefault(name, {})[mode] = trace
    return found


@pytest.mark.parametrize("device", ABSENT)
def test_each_is_one_graph_for_an_absent_device(device: str) -> None:
    traces = absent.run("compile_tests.test_layers:traced", device=device)
    assert traces.keys() == KINDS.keys()
    for name, modes in traces.items():
        assert modes
        for mode, trace in modes.items():
            assert trace["out"][0] == device
            assert trace["out"][1][-1] == HIDDEN
            assert not trace["breaks"]
            assert not trace["recompiles"]
            [graph] = trace["graphs"]
            ours = [op.split(".")[1] for op in graph["ops"] if op.startswith("mamba_ops.")]
            assert ours == getattr(KINDS[name], mode)
