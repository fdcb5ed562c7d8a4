"""Calls that are like an earlier one launch its kernels with other addresses, and with nothing else changed.

On a CPU the interpreter stands for a compiled kernel: it is given addresses, as a launch is, and reads what lies there.
"""

import ctypes
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mamba_ops import registry
from mamba_ops.ops._triton import _triton, prepared, tape
from mamba_ops.registry._torch import below_autograd
from mamba_ops.registry.adapters import Recognised, adapted_kernel
from tests.conftest import ACCELERATOR
from tests.harness import own_refusal

OPS = {name: op for name, op in registry.ops().items() if "triton" in op.kernels}


class Interpreted:
    """Stands for a compiled kernel, and for what `Tape.add` is told of one launch."""

    function = "a handle"
    packed_metadata = "what is packed"

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.kernel, self.options, self.repeated = kernel, options, 0
        self.shapes = [_extent(value) for value in arguments]

    def run(self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, *hooks_and_values: Any) -> None:
        assert (stream, function, packed) == ("a stream", self.function, self.packed_metadata)
        values = hooks_and_values[3:]
        there = [_at(value, *shape) if shape else value for value, shape in zip(values, self.shapes, strict=True)]
        self.repeated += 1
        type(self.kernel).run(self.kernel, *there, grid=(x, y, z), warmup=False, **self.options)


def _extent(value: Any) -> tuple[int, torch.dtype, Any] | None:
    """The bytes that lie from a tensor's address on, its dtype, and what it is reinterpreted as."""
    base = getattr(value, "base", value)
    if not isinstance(base, Tensor):
        return None
    storage = base.untyped_storage()
    return storage.data_ptr() + storage.nbytes() - base.data_ptr(), base.dtype, getattr(value, "dtype", None)


def _at(address: int, size: int, dtype: torch.dtype, taken_as: Any) -> Any:
    import triton

    if size < dtype.itemsize:
        return torch.empty(0, dtype=dtype)
    memory = (ctypes.c_char * (size - size % dtype.itemsize)).from_address(address)
    there = torch.frombuffer(memory, dtype=dtype)
    return there if isinstance(taken_as, torch.dtype) else triton.reinterpret(there, taken_as)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Interpreted]:
    """The launches that were written down, as kernels that can be launched again."""
    made: list[Interpreted] = []
    if ACCELERATOR is not None:
        return made
    add = tape.Tape.add

    def stand_in(self: Any, function: Any, kernel: Any, grid: Any, args: Any, kwargs: Any) -> None:
        names = function.arg_names
        options = {name: value for name, value in kwargs.items() if name not in names}
        made.append(Interpreted(function, (*args, *(kwargs[name] for name in names[len(args) :])), options))
        add(self, function, made[-1], grid, args, kwargs)

    monkeypatch.setattr(tape.Tape, "add", stand_in)
    return made


def launching() -> _triton.Launching:
    """What a launch needs: Triton's own on a GPU."""
    if ACCELERATOR is not None:
        found = _triton.launching()
        assert found is not None
        return found
    front = SimpleNamespace(run="Triton's own")
    runtime = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=None)
    return _triton.Launching(front, front.run, runtime, lambda: None, lambda _: "a stream")


class Learns:
    """An op's launcher, which counts its calls, and what learns from it."""

    def __init__(self, op: Any) -> None:
        self.launcher = pkgutil.resolve_name(op.kernels["triton"].implementation)
        self.calls = 0
        self.shortcut = prepared.Prepared(self.count, Recognised(op.parameters), launching())
        declared = op.qualname, op.parameters, op.arguments
        self.call = adapted_kernel(*declared, self.count, failed=lambda error, *_: error, shortcut=self.shortcut)

    def count(self, call: Any) -> None:
        self.calls += 1
        self.launcher(call)


def copies(op: Any, sample: registry.Sample, count: int) -> Iterator[dict[str, Any]]:
    """The same call on memory of its own, with other numbers in what is no index."""
    for number in range(count):
        values = op.fill(op.bind((clone := sample.clone()).args, clone.kwargs))
        for value in values.values():
            if isinstance(value, Tensor) and value.dtype.is_floating_point and value.is_contiguous():
                value.view(-1)[:1].mul_(1 - number / 8)
        yield values


def same(op: Any, sample: registry.Sample, learns: Learns, compared: int = 4) -> bool:
    """Compare the third call and later ones with what the launcher does; return whether they went without it."""
    learns.calls = 0
    for number, values in enumerate(copies(op, sample, compared)):
        learns.call(**values)
        if number < 2:
            continue
        *_, expected = copies(op, sample, number + 1)
        learns.launcher(op.arguments(**expected))
        for name in {*op.mutates, *op.returns}:
            torch.testing.assert_close(values[name], expected[name], rtol=0, atol=0, equal_nan=True)
    assert learns.calls in (0, 2, compared), sample  # none: another sample is of the same kind
    return learns.calls <= 2


def is_slow(name: str) -> bool:
    """The interpreter takes seconds for a call of these."""
    return ACCELERATOR is None and not name.endswith("_update")


@pytest.mark.parametrize("op", [pytest.param(op, id=n, marks=[pytest.mark.slow] * is_slow(n)) for n, op in OPS.items()])
def test_samples(op: Any, launched: list[Interpreted]) -> None:
    """The third call of its kind, and later ones, do what the launcher does, bit for bit, without it."""
    learns = Learns(op)
    sizes = {} if ACCELERATOR is not None else {"dtype": torch.float32}  # else operands of products are copied first
    samples = [s for s in op.make_samples(ACCELERATOR or "cpu", **sizes) if own_refusal(op, "triton", s) is None]
    samples = samples if ACCELERATOR is not None else samples[-3:]
    repeated = [same(op, sample, learns, 3 if ACCELERATOR is None else 4) for sample in samples]
    assert any(repeated), learns.shortcut.problems  # not those with a weight, say, that is copied first


# -- when a call goes the long way -------------------------------------------------------------------------------------


OP = OPS["causal_conv1d_update"]


class Known:
    """A short convolution's update, called so often that the next call like it goes without its launcher."""

    def __init__(self) -> None:
        self.learns = Learns(OP)
        for _ in range(3):
            self.calls()
        assert self.learns.calls == 2

    def calls(self, **changed: Any) -> int:
        """Return how often a call with these arguments called the launcher; its results are right."""
        before, device = self.learns.calls, ACCELERATOR or "cpu"
        x, state = torch.randn(3, 32, device=device), torch.randn(3, 3, 32, device=device).transpose(1, 2)
        given = {"x": x, "conv_state": state, "weight": torch.randn(32, 4, device=device), **changed}
        expected = {n: v.clone() if n == "conv_state" else v for n, v in given.items()}
        values = OP.fill(OP.bind((), given))
        self.learns.call(**values)
        out = OP.fill(OP.bind((), expected))
        self.learns.launcher(OP.arguments(**out))
        torch.testing.assert_close(values["output"], out["output"], rtol=0, atol=0)
        torch.testing.assert_close(values["conv_state"], expected["conv_state"], rtol=0, atol=0)
        return self.learns.calls - before


@pytest.fixture
def known(launched: list[Interpreted]) -> Known:
    return Known()


def test_another_kind_of_call_goes_the_long_way_twice(known: Known) -> None:
    """Other sizes, strides, dtypes, numbers and options; and the kind before is still known."""
    device = ACCELERATOR or "cpu"
    for changed in (
        {"silu": False},
        {"bias": torch.randn(32, device=device)},
        {"x": torch.randn(3, 64, device=device)[:, ::2]},
        {"x": torch.randn(3, 32, device=device).bfloat16()},
        {"slots": torch.tensor([2, 0, 1], device=device, dtype=torch.int32)},
    ):
        assert [known.calls(**changed) for _ in range(3)] == [1, 1, 0], changed
        assert known.calls() == 0


def test_addresses_that_lie_otherwise_go_the_long_way(known: Known) -> None:
    def at(offset: int) -> Tensor:
        return torch.randn(3 * 32 + 4, device=ACCELERATOR or "cpu")[offset : offset + 96].view(3, 32)

    assert [known.calls(x=at(4)), known.calls(x=at(1))] == [0, 1]


def test_what_was_one_tensor_may_not_become_two(launched: list[Interpreted]) -> None:
    """A launcher may have passed on either."""
    learns = Known().learns

    def call(*, is_one: bool) -> int:
        before, x = learns.calls, torch.randn(3, 32, device=ACCELERATOR or "cpu")
        weight = x.new_zeros(32, 4)
        weight[:, -1] = 1
        values = OP.fill(OP.bind((x, x.new_zeros(3, 32, 3), weight), {"silu": False, "out": x if is_one else None}))
        expected = x.clone()
        learns.call(**values)
        torch.testing.assert_close(values["output"], expected)
        return learns.calls - before

    assert [call(is_one=True) for _ in range(3)] == [1, 1, 0]
    assert call(is_one=False) == 1


def test_what_watches_launches_sees_all(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    with _triton.unloaded([]):
        assert known.calls() == 1
    assert known.calls() == 0
    hooks: list[Any] = known.learns.shortcut._launching.runtime.launch_enter_hook.calls
    hooks.append(lambda *_: None)
    try:
        assert known.calls() == 1
    finally:
        hooks.pop()
    assert known.calls() == 0
    monkeypatch.setattr(known.learns.shortcut._launching.front, "run", lambda *_, **__: None, raising=False)
    assert known.learns.shortcut._launching.is_watched()


def test_launches_that_may_be_chosen_anew_are_prepared_anew(known: Known) -> None:
    prepared.forget()
    assert [known.calls() for _ in range(3)] == [1, 1, 0]


def by_row(learns: Learns) -> None:
    """Let the launcher go through the rows of a call one by one."""
    launcher = learns.launcher

    def of_each(call: Any) -> None:
        for i in range(call.x.shape[0]):
            part = {name: getattr(call, name)[i : i + 1] for name in ("x", "conv_state", "output")}
            launcher(call._replace(**part))

    learns.launcher = of_each


def calls_on(learns: Learns, x: Tensor, weight: Tensor, does: Callable[[Tensor], Tensor] = lambda x: x) -> int:
    """Return how often a call on these called the launcher; what it returns is right, of what is done to x."""
    before = learns.calls
    values = OP.fill(OP.bind((x, x.new_zeros(3, 32, 3), weight), {"silu": False}))
    learns.call(**values)
    torch.testing.assert_close(values["output"], does(x) * weight[:, -1])
    return learns.calls - before


def test_launches_on_parts_of_tensors_are_repeated_on_those_of_others(launched: list[Interpreted]) -> None:
    learns, device = Learns(OP), ACCELERATOR or "cpu"
    by_row(learns)
    called = [calls_on(learns, torch.randn(3, 32, device=device), torch.randn(32, 4, device=device)) for _ in range(4)]
    assert called == [1, 1, 0, 0]


def test_a_part_that_begins_where_another_tensor_does_is_not_told_from_it(launched: list[Interpreted]) -> None:
    """Both are known by their address: in another call one of them lies elsewhere."""
    learns, device = Learns(OP), ACCELERATOR or "cpu"
    by_row(learns)

    def within() -> tuple[Tensor, Tensor]:
        memory = torch.randn(5 * 32, device=device)
        return memory[: 3 * 32].view(3, 32), memory[32:].view(32, 4)

    assert [calls_on(learns, *within()) for _ in range(3)] == [1, 1, 1]
    assert "begins where another tensor does" in " ".join(learns.shortcut.problems)
    assert calls_on(learns, torch.randn(3, 32, device=device), torch.randn(32, 4, device=device)) == 1


DOES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "reshape": lambda x: x.reshape(-1).view(x.shape),
    "to": lambda x: x.double().float(),
    "split": lambda x: x.split(2)[0].sum(dim=0, keepdim=True).expand(3, 32),
    "read": lambda x: x * (x.sum().item() * 0 + 1),
}
WITHIN: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "grad": nullcontext,
    "inference_mode": torch.inference_mode,
    "below_autograd": below_autograd,  # as a call that records gradients runs
}


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("does", DOES)
def test_what_is_not_known_to_be_the_same_is_not_repeated(does: str, within: str, launched: list[Interpreted]) -> None:
    """Where nothing records gradients, `contiguous` and the like come whole, and say that they make a view."""
    learns, device = Learns(OP), ACCELERATOR or "cpu"
    launcher = learns.launcher
    learns.launcher = lambda call: launcher(call._replace(x=DOES[does](call.x)))
    with WITHIN[within]():
        called = [
            calls_on(learns, torch.randn(32, 3, device=device).t(), torch.randn(32, 4, device=device), DOES[does])
            for _ in range(4)
        ]
    assert called == [1] * 4
    assert learns.shortcut.problems


def test_where_torch_tells_of_no_call_nothing_is_repeated(launched: list[Interpreted]) -> None:
    learns, device = Learns(OP), ACCELERATOR or "cpu"
    launcher = learns.launcher

    def doubled(call: Any) -> None:
        call.x.mul_(2)
        launcher(call)

    learns.launcher = doubled
    x, weight = torch.randn(3, 32, device=device), torch.randn(32, 4, device=device)
    with torch._C._DisableTorchDispatch():
        assert [calls_on(learns, x.clone(), weight, lambda x: x) for _ in range(3)] == [1] * 3


def test_launches_that_are_chosen_anew_meanwhile_are_not_repeated(launched: list[Interpreted]) -> None:
    learns = Known().learns
    prepared.forget()
    launcher = learns.launcher

    def forgetting(call: Any) -> None:
        launcher(call)
        prepared.forget()

    def calls() -> int:
        before, x = learns.calls, torch.randn(3, 32, device=ACCELERATOR or "cpu")
        calls_on(learns, x, x.new_ones(32, 4))
        return learns.calls - before

    assert calls() == 1
    learns.launcher = forgetting
    assert calls() == 1
    learns.launcher = launcher
    assert [calls() for _ in range(3)] == [1, 1, 0]


@pytest.mark.parametrize("within", WITHIN)
def test_a_parameter_that_is_copied_is_copied_in_every_call(within: str, launched: list[Interpreted]) -> None:
    """The copies of an earlier call are in memory that something else may have by now."""
    learns, device = Learns(OP), ACCELERATOR or "cpu"
    with WITHIN[within]():
        x, weights = torch.randn(3, 32, device=device), [torch.randn(4, 32, device=device).t() for _ in range(4)]
        assert [calls_on(learns, x, weight) for weight in weights] == [1] * 4
