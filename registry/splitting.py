"""Where engines cut graphs: the names of the splitting ops, Inductor's partition at them, and a split of FX graphs."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.registry import _torch, errors
from mamba_ops.registry.dispatcher import dispatcher

if TYPE_CHECKING:  # torch.fx costs milliseconds, which only those who split pay
    from torch.fx import Graph, GraphModule, Node

    from mamba_ops.registry.op import Op

_marked: dict[str, bool] = {}  # what users said about an op, by qualified name

_ALLOCATIONS = (torch.empty, torch.empty_like, torch.empty_strided, "new_empty", "new_empty_strided")


class Subgraph(NamedTuple):
    """One part of a split graph.

    Attributes:
        name: of the submodule.
        ops: the splitting ops in it, in order, as `namespace::name`; none in a piece to be compiled and captured.
        module: the submodule.
    """

    name: str
    ops: tuple[str, ...]
    module: "GraphModule"


class SplitGraph(NamedTuple):
    """A graph that calls its pieces, one after the other, and the pieces in that order."""

    module: "GraphModule"
    subgraphs: list[Subgraph]


def splitting_ops() -> list[str]:
    """Return the qualified names (`namespace::op`) of all ops at which engines may cut a graph.

    Those are the ops declared with `splits_graph=True`, and what `mark_splitting` said.
    """
    declared = [op.qualname for op in dispatcher.ops.values() if op.splits_graph and _marked.get(op.qualname, True)]
    return declared + [name for name, splits in _marked.items() if splits and name not in declared]


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
        name = op if isinstance(op, str) else str(op.qualname)
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
    it moves to the piece before both, so that its memory is that piece's and they are in a row. A `torch.Size` never
    goes from piece to piece, only its numbers do; nor does a tuple, its members do. `gm` itself stays as it is.

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
    for i, (splits, nodes) in enumerate(groups):
        ops = tuple(name for node in nodes if (name := _torch.schema_name(node.target)) in names) if splits else ()
        pieces.append(Subgraph(f"submod_{i}", ops, split.get_submodule(f"submod_{i}")))  # type: ignore[arg-type]
    return SplitGraph(split, pieces)


def _value(node: "Node") -> Any:
    """Return what a node's result was while tracing, if anybody noted it."""
    return node.meta.get("example_value", node.meta.get("val"))


def _take_sizes_apart(graph: "Graph") -> None:
    """Replace `x.size()` by the sizes of its dimensions, each a node of its own."""
    for node in list(graph.find_nodes(op="call_method", target="size")):
        [tensor, *dim] = node.args
        members = [u for u in node.users if u.target is operator.getitem and isinstance(u.args[1], int)]
        value = _value(tensor)
        if isinstance(value, Tensor):
            dims = range(value.dim())
        elif len(members) == len(node.users) and all(u.args[1] >= 0 for u in members):
            dims = range(1 + max((u.args[1] for u in members), default=-1))
        else:
            continue  # nobody knows how many there are
        if dim or node.kwargs:
            continue
        with graph.inserting_before(node):
            sizes = tuple(graph.call_function(torch.ops.aten.sym_size.int, (tensor, d)) for d in dims)
        for d, size in zip(dims, sizes, strict=True):
            size.meta["example_value"] = value.shape[d] if isinstance(value, Tensor) else None
        for user in members:
            user.replace_all_uses_with(sizes[user.args[1]])
            graph.erase_node(user)
        _replace(node, sizes)
        graph.erase_node(node)
        for size in [size for size in sizes if not size.users]:
            graph.erase_node(size)


def _replace(node: "Node", by: "tuple[Node, ...]") -> None:
    """Let all users of a node use a tuple of others."""
    from torch.fx.node import map_arg

    def other(argument: "Node") -> Any:
        return by if argument is node else argument

    for user in list(node.users):
        user.args, user.kwargs = map_arg(user.args, other), map_arg(user.kwargs, other)


def _grouped(graph: "Graph", names: set[str]) -> "list[tuple[bool, list[Node]]]":
    """Return the pieces as groups of nodes, each with whether it is one of splitting ops."""
    groups: list[tuple[bool, list[Node]]] = []
    group_of: dict[Node, list[Node]] = {}

    runs: list[tuple[bool, list[Node]]] = []  # as they stand in the graph
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        producer = node.args[0] if node.target is operator.getitem else None
        if producer in group_of and isinstance(_value(producer), tuple | list):
            group_of[node] = group_of[producer]
            group_of[producer].append(node)
            continue
        splits = node.op == "call_function" and _torch.schema_name(node.target) in names
        if not runs or runs[-1][0] != splits:
            runs.append((splits, []))
        runs[-1][1].append(node)
        group_of[node] = runs[-1][1]
    for splits, nodes in runs:
        if not splits and len(groups) > 1 and _only_allocates(nodes) and not _reads(nodes, groups[-1][1]):
            groups[-2][1].extend(nodes)
        elif groups and groups[-1][0] == splits:
            groups[-1][1].extend(nodes)
        else:
            groups.append((splits, nodes))
    return groups


def _only_allocates(nodes: "list[Node]") -> bool:
    """Whether nodes do nothing but allocate, and compute how much."""

    def allocates(node: "Node") -> bool:
        name = _torch.schema_name(node.target).partition("::")[2]
        return node.target in _ALLOCATIONS or name in ("empty", "empty_like", "new_empty", "empty_strided")

    return any(map(allocates, nodes)) and all(allocates(n) or isinstance(_value(n), int | torch.SymInt) for n in nodes)


def _reads(nodes: "list[Node]", others: "list[Node]") -> bool:
    return any(argument in others for node in nodes for argument in node.all_input_nodes)
