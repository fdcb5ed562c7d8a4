"""Where engines cut graphs: the names of the splitting ops, Inductor's partition at them, and a split of FX graphs."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.registry import _torch, errors
from mamba_ops.registry.dispatcher import dispatcher

if TYPE_CHECKING:  # torch.fx costs milliseconds; it is imported where a graph is split
    from torch.fx import Graph, GraphModule, Node

    from mamba_ops.registry.op import Op

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

_marked: dict[str, bool] = {}  # what users said about an op, by qualified name


class Subgraph(NamedTuple):
    """One part of a split graph: a submodule, and its name."""

    name: str
    ops: tuple[str, ...]  # splitting ops in it, in order, as `namespace::name`; none in a piece to compile and capture
    module: "GraphModule"


class SplitGraph(NamedTuple):
    """A graph that calls its pieces, one after the other, and the pieces in that order."""

    module: "GraphModule"
    subgraphs: list[Subgraph]


def splitting_ops(*, as_targets: bool = False) -> list[str]:
    """Return the qualified names (`namespace::op`) of all ops at which engines may cut a graph.

    Those are the ops declared with `splits_graph=True`, and what `mark_splitting` said.

    Args:
        as_targets: return what `str()` says of the targets of graphs' nodes, for engines that compare with that, as
            SGLang does: of each op `namespace.op`, and `namespace.op.default`, as its overload is called.
    """
    declared = [op.qualname for op in dispatcher.ops.values() if op.splits_graph and _marked.get(op.qualname, True)]
    names = declared + [name for name, splits in _marked.items() if splits and name not in declared]
    if not as_targets:
        return names
    return [
        target + overload for name in names for target in [name.replace("::", ".")] for overload in ("", ".default")
    ]


def mark_splitting(op: "Op[...] | str | Any", splits: bool = True) -> None:
    """Say, for the whole process, that engines may cut graphs at an op, or that they may not.

    Graphs that are compiled already keep their cuts. An op that reads the host (torch's tag `cudagraph_unsafe`, as our
    mixing ops have) can be captured nowhere: Inductor still cuts at it, and a piece that holds it is not captured.

    Args:
        op: any op of torch: ours, an entry of `torch.ops`, or a name `namespace::op`.
        splits: whether they may.

    Raises:
        UnknownNameError: there is no such op.
    """
    if not (name := _torch.schema_name(op)):
        name = op if isinstance(op, str) else str(getattr(op, "qualname", repr(op)))
        namespace, _, short = name.partition("::")
        if not hasattr(getattr(torch.ops, namespace), short):
            raise errors.unknown("op", name, [o.qualname for o in dispatcher.ops.values()])
    with dispatcher.lock:
        _marked[name] = splits


@contextmanager
def partition_at_splitting_ops() -> Iterator[None]:
    """Within the block, Inductor partitions what it compiles at the splitting ops.

    It compiles at a graph's first call, so that call stands in the block, too. Each part between two splitting ops is
    then captured by itself where CUDA graphs are on (`mode="reduce-overhead"`); the ops run eagerly between them.
    """
    options = _torch.partition_at(splitting_ops())
    with torch._inductor.config.patch(options):
        yield


def split_graph(gm: "GraphModule") -> SplitGraph:
    """Cut a graph of Dynamo's at the splitting ops: pieces without them and pieces of nothing else take turns.

    Splitting ops in a row share a piece. Where nothing but the allocation of an op's output stands between two of them,
    it moves to the piece before both, so that its memory is that piece's and they are in a row. From piece to piece go
    the numbers of a `torch.Size` and the members of a tuple, never these themselves. `gm` stays as it is.

    Args:
        gm: as a backend of torch.compile gets it (or from `symbolic_trace`), before AOTAutograd, which would hide the
            ops in `auto_functionalized` nodes.
    """
    from torch.fx import Graph, GraphModule
    from torch.fx.passes.split_module import split_module

    copied = Graph()
    output = copied.graph_copy(gm.graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    copied.output(output[0], output[1].type).meta = dict(output[1].meta)
    whole = GraphModule(gm, copied)
    _take_sizes_apart(whole.graph)
    names = set(splitting_ops())
    groups = _grouped(whole.graph, names)
    place = {node: i for i, (_, nodes) in enumerate(groups) for node in nodes}
    whole.recompile()
    split = split_module(whole, whole, lambda node: place[node], keep_original_order=True)
    pieces = []
    for (name, module), (_, nodes) in zip(split.named_children(), groups, strict=True):
        ops = tuple(op for node in nodes if (op := _torch.schema_name(node.target)) in names)
        pieces.append(Subgraph(name, ops, module))  # type: ignore[arg-type]
    return SplitGraph(split, pieces)


def _value(node: "Node") -> Any:
    """Return what a node's result was while tracing, if that was noted."""
    return node.meta.get("example_value", node.meta.get("val"))


def _take_sizes_apart(graph: "Graph") -> None:
    """Replace `x.size()` by a node for the size of each dimension, where Dynamo noted how many there are."""
    from torch.fx.node import map_arg

    for node in graph.find_nodes(op="call_method", target="size"):
        tensor, *dim = node.args
        value = _value(tensor)
        if dim or node.kwargs or not isinstance(value, Tensor):
            continue
        with graph.inserting_before(node):
            sizes = tuple(graph.call_function(torch.ops.aten.sym_size.int, (tensor, d)) for d in range(value.dim()))
        for size, number in zip(sizes, value.shape, strict=True):
            size.meta["example_value"] = number

        def other(argument: "Node", node: "Node" = node, sizes: Any = sizes) -> Any:
            return sizes if argument is node else argument

        for user in list(node.users):
            if user.target is operator.getitem and isinstance(user.args[1], int):
                user.replace_all_uses_with(sizes[user.args[1]])
                graph.erase_node(user)
            else:
                user.args, user.kwargs = map_arg(user.args, other), map_arg(user.kwargs, other)
        for unused in [node, *(size for size in sizes if not size.users)]:
            graph.erase_node(unused)


def _grouped(graph: "Graph", names: set[str]) -> "list[tuple[bool, list[Node]]]":
    """Return the pieces as groups of nodes, each with whether it is one of splitting ops."""
    runs: list[tuple[bool, list[Node]]] = []  # as they stand in the graph
    run_of: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        producer = node.args[0] if node.target is operator.getitem else None
        if producer in run_of and isinstance(_value(producer), tuple | list):
            run = run_of[producer]  # a tuple is taken apart in the piece that made it
        else:
            splits = node.op == "call_function" and _torch.schema_name(node.target) in names
            if not runs or runs[-1][0] != splits:
                runs.append((splits, []))
            run = runs[-1][1]
        run.append(node)
        run_of[node] = run
    groups: list[tuple[bool, list[Node]]] = []
    for splits, nodes in runs:
        if not splits and len(groups) > 1 and _may_stand_before(nodes, groups[-1][1]):
            groups[-2][1].extend(nodes)
        elif groups and groups[-1][0] == splits:
            groups[-1][1].extend(nodes)
        else:
            groups.append((splits, nodes))
    return groups


def _may_stand_before(nodes: "list[Node]", others: "list[Node]") -> bool:
    """Whether nodes only allocate, and compute how much, from nothing that the others make."""

    def allocates(node: "Node") -> bool:
        name = _torch.schema_name(node.target).partition("::")[2]
        return (name or getattr(node.target, "__name__", str(node.target))) in _ALLOCATIONS

    return (
        any(map(allocates, nodes))
        and all(allocates(node) or isinstance(_value(node), int | torch.SymInt) for node in nodes)
        and not any(argument in others for node in nodes for argument in node.all_input_nodes)
    )
