"""Declaring ops: what becomes of a function, and what is refused."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import registry
from mamba_ops.registry import (
    DeclarationError,
    Namespace,
    Op,
    RegistryError,
    explain,
    require_out,
)
from tests.registry.toys import call


def test_front_allocates_writes_and_mutates(add: Op[...]) -> None:
    total, x = torch.zeros(3), torch.ones(3)
    assert torch.equal(add(total, x, scale=2.0), torch.full((3,), 2.0))
    out = torch.empty(3)
    assert add(total, x, out=out) is out
    assert torch.equal(total, torch.full((3,), 2.0))
    assert torch.equal(out, total)


def test_schema_says_the_whole_truth(add: Op[...]) -> None:
    assert add.schema == (
        "(Tensor(a0!) total, Tensor x, *, Tensor? bias=None, float scale=1.0, Tensor(a4!) output, "
        "Tensor? selection=None) -> ()"
    )
    assert add.overload.name() == torch.ops.toys.add.default.name()  # torch keeps one that an earlier test removed
    assert registry.ops()["add"] is add
    assert str(add.__signature__) == "(total, x, *, bias=None, scale=1.0, out=None)"
    assert add.__doc__ == "Add x to total; write the scaled total."


def test_schema_form_of_a_declaration(toys: Namespace) -> None:
    @toys.op(mutates=("output",), splits_graph=True)
    def double(x: Tensor, *, output: Tensor) -> None:
        torch.mul(x, 2, out=output)

    @double.allocate_output
    def _output(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    assert "toys::double" in registry.splitting_ops()


def test_a_number_that_may_be_left_out(toys: Namespace) -> None:
    """None where it is; another number is another call, checked and decided by itself."""
    seen: list[float | None] = []

    @toys.op()
    def scaled(x: Tensor, *, scale: float | None = None, out: Tensor | None = None) -> Tensor:
        return torch.mul(x, 0.5 if scale is None else scale, out=require_out(out))

    @scaled.allocate_output
    def _output(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    @scaled.validate
    def _checks(scale: float | None) -> None:
        seen.append(scale)

    assert "float? scale=None" in scaled.schema
    x = torch.ones(2)
    calls: list[tuple[dict[str, Any], float]] = [({}, 0.5), ({"scale": 3.0}, 3.0), ({"scale": None}, 0.5)]
    for options, expected in calls:
        assert torch.equal(scaled(x, **options), x * expected)
    assert seen == [None, 3.0]
    compiled = torch.compile(lambda x, **options: scaled(x, **options), fullgraph=True, backend="aot_eager")
    for options, expected in calls:
        assert torch.equal(compiled(x, **options), x * expected)


def test_a_cache_that_may_be_left_out(toys: Namespace, backend: Any) -> None:
    """None in the front and in kernels, an empty tensor at the op, a Tensor in the schema."""
    seen: list[Tensor | None] = []

    @toys.op(mutates=("cache", "out"))
    def keep(x: Tensor, *, cache: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        seen.append(cache)
        if cache is not None:
            cache += x
        return require_out(out).copy_(x)

    @keep.validate
    def _checks(cache: Tensor | None) -> None:
        assert cache is None or cache.numel()

    @keep.allocate_output
    def _output(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    assert keep.schema == "(Tensor x, *, Tensor(a1!) cache, Tensor(a2!) output, Tensor? selection=None) -> ()"
    x, cache = torch.ones(2), torch.zeros(2)
    compiled = torch.compile(lambda x, cache: keep(x, cache=cache), fullgraph=True, backend="aot_eager")
    for run in (lambda x, cache: keep(x, cache=cache), compiled):
        for given_cache in (None, cache):
            assert torch.equal(run(x, given_cache), x)
    keep.overload(x, cache=x.new_empty(0), output=torch.empty(2))
    assert [c is None for c in seen] == [True, False, True, False, True]
    assert cache.tolist() == [2.0, 2.0]
    assert explain(keep, x).backend == "torch"
    torch.library.opcheck(keep.overload, (x,), {"cache": cache, "output": torch.empty(2)})

    def _keep(x: Tensor, *, cache: Tensor | None = None, output: Tensor) -> None:
        output.zero_()

    backend("other").implements(keep)(_keep)

    def optional(x: Tensor, *, cache: Tensor | None = None, output: Tensor) -> None: ...

    with pytest.raises(DeclarationError, match="cache: a mutated argument is a Tensor, never optional; where it may"):
        declare(toys, optional, "cache", "output")


def test_op_without_output(toys: Namespace) -> None:
    @toys.op(mutates=("x",))
    def bump(x: Tensor, by: int = 1) -> None:
        x += by

    x = torch.zeros(2)
    assert bump(x, 3) is None
    assert x.tolist() == [3.0, 3.0]


def test_copies_of_an_op_are_the_op() -> None:
    op = registry.ops()["causal_conv1d_update"]
    assert copy.deepcopy(op) is op
    assert pickle.loads(pickle.dumps(op)) is op


def declare(toys: Namespace, function: Any, *mutates: str) -> None:
    toys.op(mutates=mutates)(function)


def _string(x: Tensor, layer: str, *, out: Tensor | None = None) -> Tensor: ...  # type: ignore[empty-body]
def _optional(x: Tensor, cache: Tensor | None, *, out: Tensor | None = None) -> Tensor: ...  # type: ignore[empty-body]
def _tuple(x: Tensor, limits: tuple[float, float], *, out: Tensor | None = None) -> Tensor: ...  # type: ignore[empty-body]
def _positional(x: Tensor, out: Tensor | None = None) -> Tensor: ...  # type: ignore[empty-body]
def _splat(x: Tensor, *more: Tensor, out: Tensor | None = None) -> Tensor: ...  # type: ignore[empty-body]
def _future(x: "Tensor", *, out: "Tensor | None" = None) -> Tensor: ...  # type: ignore[empty-body]
def _selection(x: Tensor, selection: Tensor, *, out: Tensor | None = None) -> Tensor: ...  # type: ignore[empty-body]
def _plain(x: Tensor, *, out: Tensor | None = None) -> Tensor: ...  # type: ignore[empty-body]
def _numbers(n: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "mutates", "says"),
    [
        (_string, ["out"], r"layer: got <class 'str'>, expected Tensor"),
        (_optional, ["cache", "out"], "cache: a mutated argument is a Tensor, never optional"),
        (_tuple, ["out"], "limits: got tuple"),
        (_positional, ["out"], "the output must be keyword-only"),
        (_splat, ["out"], r"\*args, \*\*kwargs and positional-only do not fit a schema"),
        (_future, ["out"], "drop `from __future__ import annotations`"),
        (_selection, ["out"], "`selection` is the registry's own"),
        (_plain, ["cache", "out"], "mutates cache, which it does not have"),
        (_plain, ["x"], "name output and caches in `mutates`"),
        (_numbers, ["n"], "n: a mutated argument is a Tensor"),
    ],
)
def test_declarations_that_torch_would_accept_and_break_on(
    toys: Namespace, function: Any, mutates: Any, says: str
) -> None:
    with pytest.raises(DeclarationError, match=says):
        declare(toys, function, *mutates)


def test_duplicates_point_at_the_first(toys: Namespace, add: Op[...], backend: Any) -> None:
    def _add(x: Tensor, *, out: Tensor | None = None) -> Tensor: ...  # type: ignore[empty-body]

    _add.__name__ = "add"
    with pytest.raises(DeclarationError, match=r"op 'toys::add' is already registered, at .*conftest.py:\d+"):
        declare(toys, _add, "out")
    backend("once")
    with pytest.raises(DeclarationError, match=r"backend 'once' is already registered, at .*conftest.py:\d+"):
        backend("once")
    with pytest.raises(DeclarationError, match=r"namespace 'toys' is already registered"):
        Namespace("toys")


def test_facets_name_the_ops_parameters(add: Op[...]) -> None:
    with pytest.raises(DeclarationError, match="names y, which the op does not have"):
        add.validate(lambda x, y: None)
    with pytest.raises(DeclarationError, match="names output"):
        add.allocate_output(lambda output: output)


def test_facets_may_take_everything(add: Op[...]) -> None:
    seen: list[Any] = []
    add.validate(lambda *args, **kwargs: seen.append((len(args), sorted(kwargs))))
    add.allocate_output(lambda *args, **kwargs: args[1].new_zeros(args[1].shape))
    assert call(add) == 1.0
    assert seen == [(2, ["bias", "output", "scale"])]


def test_without_outputs_out_must_be_given(toys: Namespace) -> None:
    @toys.op()
    def nothing(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        return require_out(out)

    with pytest.raises(DeclarationError, match=r"called without `out` and has no @op.allocate_output"):
        nothing(torch.ones(1))
    with pytest.raises(RegistryError, match="called without `out`"):
        nothing.reference(torch.ones(1))


def test_the_design_shows_a_front_as_it_is_generated() -> None:
    op = registry.ops()["causal_conv1d_update"]
    assert isinstance(op, Op)
    front, _ = op.source_code().split("\n\n")
    shown = (Path(__file__).parents[2] / "docs" / "design.md").read_text(encoding="utf-8")
    # The numbers of sentences, and so where lines are broken, depend on what else is registered.
    made, expected = (" ".join(re.sub(r"out,\s+\d+\)", "out, N)", text).split()) for text in (front, shown))
    assert made in expected
