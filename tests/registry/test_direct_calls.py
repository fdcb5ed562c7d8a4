"""A repeated eager call goes past torch's dispatcher, unless something there would notice it."""

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_ops.registry import Namespace, Op, use_backend
from mamba_ops.registry.errors import ArgumentTypeError

CALLERS: list[str] = []  # the generated functions that ran the kernel: the front `__call__`, or the body `run`


@pytest.fixture
def op(add: Op[...], backend: Any) -> Op[...]:
    """An op that was called often enough to be known, on a backend that notes from where it is called."""
    CALLERS.clear()

    def kernel(total: Tensor, x: Tensor, *, bias: Tensor | None = None, scale: float = 1.0, output: Tensor) -> None:
        CALLERS.append(sys._getframe(2).f_code.co_name)  # 1 is what checks values, on a CPU
        output.fill_(7)

    backend("noting", priority=50).implements(add)(kernel)
    for _ in range(3):
        add(*arguments(), out=torch.zeros(3))
    assert CALLERS == ["run", "run", "__call__"]
    CALLERS.clear()
    return add


def arguments() -> tuple[Tensor, Tensor]:
    return torch.zeros(3), torch.ones(3)


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "watching", [Dispatching, Functions, partial(torch.device, "cpu"), partial(torch.profiler.profile, acc_events=True)]
)
def test_what_watches_the_dispatcher_sees_a_known_call(op: Op[...], watching: Any) -> None:
    with watching() as watcher:
        out = op(*arguments())
    assert CALLERS == ["run"]
    assert out.tolist() == [7, 7, 7]
    if isinstance(watcher, torch.profiler.profile):
        assert [event.name for event in watcher.events()].count("toys::add") == 1
    op(*arguments())
    assert CALLERS == ["run", "__call__"]


def test_fake_tensors_and_fake_modes_run_nothing(op: Op[...]) -> None:
    total, x = arguments()
    with FakeTensorMode() as mode:
        fake = op(mode.from_tensor(total), mode.from_tensor(x))
    assert type(fake) is not Tensor
    with FakeTensorMode(allow_non_fake_inputs=True):
        op(total, x)
    assert CALLERS == []


def test_subclasses_and_functorch_go_through_the_dispatcher(op: Op[...]) -> None:
    class Sub(Tensor): ...

    total, x = arguments()
    op(total, x.as_subclass(Sub))
    assert CALLERS == ["run"]
    with pytest.raises(ArgumentTypeError, match=r"toys::add: x: got a tensor under a transform \(vmap, grad, jvp"):
        torch.func.vmap(lambda x: op(total, x, out=torch.zeros(3)))(torch.ones(2, 3))
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda total, x: op(total, x))(total, x)
    assert any(node.target is op.overload for node in graph.graph.nodes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_modes_of_torch_that_only_torchs_own_ops_heed(op: Op[...], mode: Any) -> None:
    block: AbstractContextManager[Any] = mode()
    with block:
        for _ in range(4):
            op(*arguments())
    assert CALLERS[-1] == "__call__"


def test_a_swap_and_other_numbers_are_noticed(op: Op[...]) -> None:
    total, x = arguments()
    with use_backend("torch"):
        assert op(total, x).tolist() == [1, 1, 1]
    op(total, x, scale=2.0)
    assert CALLERS == ["run"]
    x.requires_grad_()
    with pytest.raises(ValueError, match="toys::add: x: got a tensor that requires grad"):
        op(total, x)


def test_autograd_learns_what_a_kernel_wrote_behind_torch(add: Op[...], backend: Any) -> None:
    """Else a backward pass that needs what was there before takes what is there now, and says nothing."""

    def kernel(total: Tensor, x: Tensor, *, bias: Tensor | None = None, scale: float = 1.0, output: Tensor) -> None:
        total.numpy()[:] += x.numpy()
        output.numpy()[:] = total.numpy()

    backend("aside", priority=50).implements(add)(kernel)
    total, x = arguments()
    for call in range(4):  # through the dispatcher, and past it
        out, weight = torch.zeros(3), torch.ones(3, requires_grad=True)
        for written in (total, out):
            product = (weight * written).sum()
            with torch.no_grad():
                add(total, x, out=out)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()
        assert total.tolist() == [2 * call + 2] * 3
    with torch.inference_mode():  # where tensors have no versions
        total, out = torch.zeros(3), torch.zeros(3)
        assert [add(total, x, out=out).tolist() for _ in range(4)] == [[n] * 3 for n in (1, 2, 3, 4)]


def test_autograd_learns_what_a_kernel_wrote_to_caches_that_may_be_left_out(toys: Namespace, backend: Any) -> None:
    @toys.op(mutates=("cache", "out"))
    def keep(x: Tensor, *, cache: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Copy x, also to a cache."""
        assert out is not None
        if cache is not None:
            cache.copy_(x)
        return out.copy_(x)

    def kernel(x: Tensor, *, cache: Tensor | None = None, output: Tensor) -> None:
        for written in (output, *(() if cache is None else (cache,))):
            written.numpy()[:] = x.numpy()

    keep.allocate_output(lambda x: torch.empty_like(x))
    backend("aside", priority=50).implements(keep)(kernel)
    x, cache = torch.ones(3), torch.zeros(3)
    for call in range(3):
        assert keep(x)._version > 0
        assert keep(x, cache=cache)._version > 0
        assert cache._version == call + 1
