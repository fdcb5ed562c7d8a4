"""Cutting a graph at splitting ops, on toys: what goes into which piece, and what crosses from one to the next."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from mamba_ops import registry
from mamba_ops.registry import Namespace, SplitGraph, mark_splitting, require_out, split_graph, splitting_ops

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "cut")


@pytest.fixture
def cut(toys: Namespace) -> Iterator[Any]:
    """An op that splits."""

    @toys.op(splits_graph=True)
    def cut(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Double."""
        output = require_out(out)
        output.copy_(2 * x)
        return output

    @cut.allocate_output
    def _output(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    with mock.patch.dict(registry.splitting._marked, clear=True):  # back again afterwards
        yield cut


def split(function: Callable[..., Any], *args: Tensor, dynamic: bool = False) -> SplitGraph:
    """Split what Dynamo makes of a function, and see to it that it still computes the same."""
    made: list[SplitGraph] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        before = str(gm.graph)
        made.append(split_graph(gm))
        assert str(gm.graph) == before
        return made[-1].module

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(*args), function(*args), rtol=0, atol=0)
    assert len(made) == 1
    assert [name for name, _ in made[0].module.named_children()] == [piece.name for piece in made[0].subgraphs]
    return made[0]


def shape_of(graph: SplitGraph) -> list[int]:
    """How many splitting ops each piece has; 0: one to compile."""
    return [len(piece.ops) for piece in graph.subgraphs]


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_twice_as_many_pieces_as_ops_and_one(cut: Any, layers: int) -> None:
    def model(x: Tensor) -> Tensor:
        for _ in range(layers):
            x = x + cut(x.sin()) * 3
        return x

    graph = split(model, torch.randn(4, 3))
    assert shape_of(graph) == [0, 1] * layers + [0]
    assert len(graph.subgraphs) == 2 * layers + 1
    assert graph.subgraphs[1].ops == ("toys::cut",)


def test_ops_in_a_row_share_a_piece(cut: Any) -> None:
    """The allocation between them is all that stands there: it joins the piece before both."""

    def model(x: Tensor) -> Tensor:
        x = x + 1
        return cut(cut(x)) + cut(x)

    graph = split(model, torch.randn(4, 3), dynamic=True)
    assert shape_of(graph) == [0, 3, 0]
    assert sum("new_empty" in str(node.target) for node in graph.subgraphs[0].module.graph.nodes) == 3


def test_an_allocation_that_needs_the_op_before_it_stays_behind(cut: Any) -> None:
    def model(x: Tensor) -> Tensor:
        y = cut(x.sin())
        return cut(torch.empty_like(y[:2]).zero_())

    assert shape_of(split(model, torch.randn(4, 3))) == [0, 1, 0, 1]


def test_a_first_allocation_has_no_piece_to_join(cut: Any) -> None:
    assert shape_of(split(lambda x: cut(x) + 1, torch.randn(4, 3))) == [0, 1, 0]


def test_a_graph_without_splitting_ops_is_one_piece() -> None:
    assert shape_of(split(lambda x: x.sin() + 1, torch.randn(4, 3))) == [0]


def test_numbers_cross_and_sizes_do_not(cut: Any) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sin()
            size = y.size()
            out = torch.empty_like(y)
            torch.ops.toys.cut(y, output=out)
            return out.reshape(size[0] * size[1]).reshape(size)

    gm = torch.fx.symbolic_trace(Model())
    for node in gm.graph.nodes:  # as Dynamo notes it
        node.meta["example_value"] = torch.empty(4, 3) if node.name in ("x", "sin", "empty_like") else None
    graph = split_graph(gm)
    assert shape_of(graph) == [0, 1, 0]
    assert not graph.module.graph.find_nodes(op="call_method", target="size")
    outputs = graph.subgraphs[0].module(torch.randn(4, 3))
    assert not any(isinstance(value, torch.Size) for value in outputs)
    assert {value for value in outputs if isinstance(value, int)} == {4, 3}


def test_tuples_stay_in_the_piece_that_made_them(toys: Namespace) -> None:
    library = torch.library.Library("toys", "FRAGMENT")
    library.define("two(Tensor x) -> (Tensor, Tensor)")
    library.impl("two", lambda x: (x + 1, x - 1), "CompositeExplicitAutograd")
    torch.library.register_fake("toys::two", lambda x: (torch.empty_like(x), torch.empty_like(x)), lib=library)
    mark_splitting("toys::two")

    def model(x: Tensor) -> Tensor:
        big, small = torch.ops.toys.two(x * 2)
        return big * small

    graph = split(model, torch.randn(4, 3))
    assert shape_of(graph) == [0, 1, 0]
    assert all(isinstance(value, Tensor) for value in graph.subgraphs[1].module(torch.randn(4, 3)))
    library._destroy()


def test_users_mark_their_ops_and_unmark_ours(cut: Any) -> None:
    def model(x: Tensor) -> Tensor:
        return torch.ops.aten.cos.default(cut(x + 1)) * 2

    assert splitting_ops()[-1] == "toys::cut"
    assert shape_of(split(model, torch.randn(4, 3))) == [0, 1, 0]
    for op in (torch.ops.aten.cos, torch.ops.aten.cos.default, "aten::cos"):
        mark_splitting(op)
        assert splitting_ops()[-2:] == ["toys::cut", "aten::cos"]
    torch._dynamo.reset()
    assert [piece.ops for piece in split(model, torch.randn(4, 3)).subgraphs] == [(), ("toys::cut", "aten::cos"), ()]
    mark_splitting(cut, False)
    assert splitting_ops()[-1] == "aten::cos"
    assert "toys::cut" not in splitting_ops()
    torch._dynamo.reset()
    assert [piece.ops for piece in split(model, torch.randn(4, 3)).subgraphs] == [(), ("aten::cos",), ()]


def test_an_op_that_there_is_not_is_no_splitting_op() -> None:
    with pytest.raises(registry.UnknownNameError, match=r"unknown op 'toys::none'; valid: .*toys::cut"):
        mark_splitting("toys::none")
    with pytest.raises(registry.UnknownNameError, match=r"unknown op '3'; valid: .*toys::cut"):
        mark_splitting(3)


def test_inductor_is_told_the_same_names(cut: Any) -> None:
    from torch._inductor import config

    before = config.graph_partition, config.custom_should_partition_ops
    with registry.partition_at_splitting_ops():
        assert config.graph_partition
        assert config.custom_should_partition_ops == splitting_ops()
    assert (config.graph_partition, config.custom_should_partition_ops) == before
