"""What a trace for a device that is not here tells, and how the device gets there.

A device once installed stays for the life of its process: what installs one runs in a child, as a `child_` function.
"""

import inspect
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_ops.audit import absent
from tests.conftest import ABSENT

COMPILER = shutil.which("c++") or shutil.which("g++")


# What is traced


class Block(nn.Module):
    """An MLP with a cache, doing what fake tensors alone cannot do on an absent device."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.register_buffer("table", torch.zeros(4, 8))
        self.scale = torch.ones(8)  # neither parameter nor buffer

    def forward(self, x: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        hidden = self.down(F.silu(self.up(x))) * self.scale + self.table[0]
        cache[slots] = hidden
        cache.copy_(cache * 2)
        output = torch.empty_like(hidden)
        torch.ops.absent_toy.step(cache, hidden, output=output)
        padded = torch.zeros(x.shape[0], 8, device=x.device)
        padded[:, :2] = hidden[:, :2]
        weight = nn.init.normal_(torch.empty(8, 8, device=x.device))
        attended = F.scaled_dot_product_attention(hidden[None, None], hidden[None, None], hidden[None, None])[0, 0]
        constant = torch.tensor([0.5], device=x.device)
        return output + padded @ weight + attended + constant + hidden.to("cpu").to(x.device)


def block_inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(tokens, 8), torch.zeros(20, 8), torch.zeros(tokens, dtype=torch.int64)


def breaks_in_two(x: Tensor) -> Tensor:
    x = x + 1
    torch._dynamo.graph_break(msg="on purpose")
    return x * 2


def gives_up(x: Tensor) -> Tensor:
    for _ in range(2):
        x = x + 1
        torch._dynamo.graph_break(msg="on purpose")
    return x


def reads_a_value(x: Tensor) -> Tensor:
    y = x + 1
    return y if y.sum() > 0 else x


def line_of_break(function) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if 'graph_break' in line or 'if' in line)}"


# What runs in children


def child_survey(*, device: str) -> dict[str, object]:
    toy = torch.library.Library("absent_toy", "DEF")
    toy.define("step(Tensor(a!) state, Tensor x, *, Tensor(b!) output) -> ()")
    toy.impl("step", lambda state, x, *, output: None, "CompositeExplicitAutograd")
    torch.library.register_fake("absent_toy::step", lambda state, x, *, output: None, lib=toy)

    found: dict[str, object] = {"how": absent.install(device)}
    for dynamic in (None, True):
        tracer = absent.Tracer(Block(), device=device, dynamic=dynamic)
        results = [tracer(*block_inputs(tokens)) for tokens in (3, 5, 7)]
        assert len(tracer.trace.graphs) == torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch._dynamo.utils.counters.clear()
        found[f"block, dynamic={dynamic}"] = tracer.trace
    found["result"] = [str(results[-1].device), list(results[-1].shape)]
    for function in (breaks_in_two, gives_up, reads_a_value):
        found[function.__name__] = absent.trace(function, torch.zeros(3), device=device)
    host = absent.fake(torch.zeros(3), "cpu")
    found["host"] = [str(t.device) for t in absent.Tracer(lambda *xs: xs, device=device)(torch.zeros(3), host)]
    return found


def child_how(*, device: str) -> str:
    how = absent.install(device)
    assert len(absent.trace(lambda x: x[0].copy_(x[1]) + 1, torch.zeros(2, 3), device=device).graphs) == 1
    return how


def child_raises(word: str, *, device: str) -> None:
    raise ValueError(f"{word} on {device}")


def child_dies(*, device: str) -> None:
    print("last words", flush=True)  # noqa: T201
    os.abort()


def run(function, *args: object, device: str) -> object:
    return absent.run(f"{__name__}:{function.__name__}", *args, device=device, timeout=120)


# The tests


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["XDG_CACHE_HOME"])


@pytest.fixture(scope="module", params=ABSENT)
def survey(request: pytest.FixtureRequest, cache: Path) -> tuple[str, dict]:
    return request.param, run(child_survey, device=request.param)


def test_a_module_is_one_graph_with_the_names_of_its_ops(survey):
    device, found = survey
    trace = found["block, dynamic=True"]
    (graph,) = trace["graphs"]
    assert trace["breaks"] == trace["recompiles"] == []
    assert trace["stopped"] is None
    assert found["result"] == [f"{device}:0", [7, 8]]
    assert graph["ops"].count("torch._C._nn.linear") == 2
    assert graph["ops"].count("absent_toy.step") == 1
    assert "auto_functionalized_v2(absent_toy.step.default)" in graph["aot_ops"]
    assert "aten.addmm.default" in graph["aot_ops"]
    assert "aten.bmm.default" in graph["aot_ops"]  # attention, as the math op


def test_sizes_seen_one_after_the_other_recompile_once(survey):
    _, found = survey
    trace = found["block, dynamic=None"]
    assert len(trace["graphs"]) == 2
    (reason,) = trace["recompiles"]
    assert reason.startswith("forward: ")
    assert "expected 3, actual 5" in reason


def test_a_break_has_its_place_and_reason(survey):
    _, found = survey
    trace = found["breaks_in_two"]
    assert [graph["ops"] for graph in trace["graphs"]] == [["operator.add"], ["operator.mul"]]
    (broken,) = trace["breaks"]
    assert broken["where"] == line_of_break(breaks_in_two)
    assert "on purpose" in broken["reason"]


def test_a_function_that_dynamo_gives_up_has_no_graph_but_a_reason(survey):
    _, found = survey
    trace = found["gives_up"]
    assert trace["graphs"] == []
    (broken,) = trace["breaks"]
    assert broken["where"] == line_of_break(gives_up)
    assert "on purpose" in broken["reason"]


def test_a_value_read_between_graphs_ends_the_trace_and_says_so(survey):
    _, found = survey
    trace = found["reads_a_value"]
    assert len(trace["graphs"]) == 1
    assert [broken["where"] for broken in trace["breaks"]] == [line_of_break(reads_a_value)]
    assert "_local_scalar_dense" in trace["stopped"]


def test_a_tensor_given_as_fake_stays_on_its_device(survey):
    device, found = survey
    assert found["host"] == [f"{device}:0", "cpu"]


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler here")
@pytest.mark.parametrize("survey", ABSENT[:1], indirect=True)
def test_the_guard_is_compiled_once_per_torch(survey, cache, monkeypatch):
    device, found = survey
    assert found["how"] == "compiled"
    (library,) = cache.rglob(f"*{device}*.so")
    assert torch.__version__ in library.name
    monkeypatch.setenv("PATH", "")  # no compiler to be found
    assert run(child_how, device=device) == "compiled"


@pytest.mark.parametrize("device", ABSENT)
def test_without_a_compiler_the_guard_is_borrowed(device, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    assert run(child_how, device=device) == "borrowed"


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_present_device_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.get_device_module(device), "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=f"{device} is present on this machine"):
        absent.install(device)


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="got 'cuda:0', expected 'cuda' or 'xpu'"):
        absent.install("cuda:0")


@pytest.mark.parametrize("device", ABSENT)
def test_a_torch_without_the_table_is_named(device, monkeypatch):
    monkeypatch.setattr(absent, "_GUARD_TABLE", "no_such_symbol")
    with pytest.raises(RuntimeError, match=r"has no symbol no_such_symbol.*install g\+\+"):
        absent.install(device, compiler=False)


@pytest.mark.parametrize("device", ABSENT[:1])
def test_what_goes_wrong_in_the_child_is_told(device, cache):
    with pytest.raises(absent.ChildError, match=f"ValueError: no luck on {device}"):
        run(child_raises, "no luck", device=device)
    with pytest.raises(absent.ChildError, match="died with code -6\nlast words"):
        run(child_dies, device=device)


def test_fake_keeps_everything_but_the_device_and_the_values():
    block = Block()
    block.tied = block.down.weight
    pool = torch.zeros(10, dtype=torch.bfloat16)
    rows, columns = pool[2:4], pool.view(5, 2).t()
    torch._dynamo.mark_dynamic(columns, 1)
    faked, (fake_rows, fake_columns), same = absent.fake((block, [rows, columns], block.table), "xpu")

    assert {str(t.device) for t in [*faked.parameters(), *faked.buffers(), faked.scale, fake_rows]} == {"xpu:0"}
    assert [name for name, _ in faked.named_parameters()] == [name for name, _ in block.named_parameters()]
    assert not any(parameter.requires_grad for parameter in faked.parameters())
    assert faked.tied is faked.down.weight
    assert same is faked.table
    assert (fake_columns.dtype, fake_columns.shape, fake_columns.stride()) == (torch.bfloat16, (2, 5), (1, 2))
    assert fake_columns._dynamo_dynamic_indices == {1}
    assert fake_rows.storage_offset() == 2
    assert fake_rows.untyped_storage()._cdata == fake_columns.untyped_storage()._cdata
    assert absent.fake(fake_rows, "cuda") is fake_rows
    assert str(block.scale.device) == "cpu"
