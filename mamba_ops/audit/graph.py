"""Reads graphs: kernels that the compiler cannot place, the segments between splitting ops, copies that were added."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from mamba_ops.audit import _torch
from mamba_ops.audit.outcomes import GraphSegment
from mamba_ops.audit.source_locations import Layers, SourceLocation, locations_in_text
from mamba_ops.registry import splitting_ops

Found = tuple[str, str, str, tuple[SourceLocation, ...]]  # cause, op, message, stack
_INERT = ("placeholder", "output", "get_attr")
_UNROLLED = 16  # as many of one op on one line of one module are a loop over tokens, chunks or experts


def stack_of(node: fx.Node) -> tuple[SourceLocation, ...]:
    """Return the user code that a node was traced from; for a node that a pass made, that of a neighbour."""
    for other in (node, *node.users, *node.all_input_nodes):
        if locations := locations_in_text(other.meta.get("stack_trace")):
            return locations
    return ()


def walk(module: fx.GraphModule) -> list[Found]:
    """Return what Dynamo put into a graph that costs something there."""
    found: list[Found] = []
    for node in module.graph.nodes:
        if node.op in _INERT:
            continue
        name = getattr(node.target, "__name__", str(node.target))
        if name.startswith("triton_kernel_wrapper"):
            kernel = _triton_name(node)
            message = "the graph holds a raw Triton launch, whose writes the compiler has to guess"
            found.append(("triton", kernel, message, stack_of(node)))
        elif name == "autograd_function_apply":
            stack = stack_of(node)
            found.append(("autograd-function", _function_name(stack), "Dynamo traced the inside of a Function", stack))
        elif moved := _to_host(node):
            found.append(("host-copy", moved, "copies a tensor of the device to the host", stack_of(node)))
    return [*found, *_unrolled(module)]


def _unrolled(module: fx.GraphModule) -> Iterator[Found]:
    """Return unrolled loops: of each function, the line with the most nodes in the graph."""
    counts = Counter[tuple[tuple[SourceLocation, ...], str | None, str]]()
    for node in module.graph.nodes:
        if node.op not in _INERT and (stack := locations_in_text(node.meta.get("stack_trace"))):
            counts[stack, _numbered(node), str(node.target)] += 1
    worst: dict[tuple[str, str], tuple[int, tuple[SourceLocation, ...]]] = {}
    for (stack, _, _), count in counts.items():
        key = stack[-1].file, stack[-1].function
        if count >= max(_UNROLLED, worst.get(key, (0,))[0] + 1):
            worst[key] = count, stack
    lines = {stack[-1] for _, stack in worst.values()}
    for count, stack in worst.values():
        if lines.intersection(stack[:-1]):
            continue  # it is called from another line that is found
        message = f"the graph holds this line {count} times: it was traced step by step"
        yield "unrolled", stack[-1].function, message, stack


def mutated_inputs(module: fx.GraphModule) -> Iterator[Found]:
    """Return the inputs that a compiled graph writes to, and that may have another address in the next call."""
    facts = _torch.lowering_facts()
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    if facts is None or len(inputs) != len(facts.input_info):
        return
    fixed = set(facts.static_input_indices or ())
    for at, (node, info) in enumerate(zip(inputs, facts.input_info, strict=True)):
        if info.mutates_data and at not in fixed:
            source = getattr(node.meta.get("grapharg"), "source", None)
            name = re.sub(r"^L\['(\w+)'\]", r"\1", str(getattr(source, "name", None) or node.name))
            yield (
                "capture-input",
                name,
                f"the graph writes to its input {name}, so no CUDA graph is recorded of it",
                stack_of(node),
            )


def _triton_name(node: fx.Node) -> str:
    kernel = _torch.triton_kernel(node)
    while hasattr(kernel, "fn") and not hasattr(kernel, "__name__"):
        kernel = kernel.fn
    return str(getattr(kernel, "__name__", None) or getattr(getattr(kernel, "fn", None), "__name__", "a kernel"))


def _function_name(stack: tuple[SourceLocation, ...]) -> str:
    source = stack[-1].source if stack else ""
    return source.partition(".apply")[0].split()[-1].split("(")[-1] if ".apply" in source else "autograd.Function"


def _to_host(node: fx.Node) -> str | None:
    """Return the name of what a node calls, if it copies a tensor from the device to the host."""
    value = node.meta.get("example_value")
    source = node.args[0] if node.args else None
    if not isinstance(value, Tensor) or not isinstance(source, fx.Node) or value.device.type != "cpu":
        return None
    before = source.meta.get("example_value")
    if isinstance(before, Tensor) and before.device.type not in ("cpu", "meta"):
        return f".{node.target}()" if node.op == "call_method" else str(node.target)
    return None


def segments(module: fx.GraphModule, layers: Layers, inside: str = "") -> list[GraphSegment]:
    """Return how splitting ops divide a graph; the segments between them can be captured.

    Args:
        module: the graph, as Dynamo made it.
        layers: the model's.
        inside: the name of the module that the graph is of.
    """
    names = set(splitting_ops())
    divided: list[GraphSegment] = []
    for node in module.graph.nodes:
        if node.op in _INERT:
            continue
        where = layers.of(stack_of(node))
        where = where if len(where) == 1 else ()  # code that several layers share does not identify one
        path = ".".join(filter(None, (inside, _numbered(node))))
        shown = (path,) if path else where
        name = op_name(node.target)
        if name in names:
            divided.append(GraphSegment(1, name, shown))
            continue
        if not divided or divided[-1].splitting:
            divided.append(GraphSegment(0))
        divided[-1].ops += 1
        divided[-1].layers = tuple(dict.fromkeys(divided[-1].layers + shown))
    return divided


def _numbered(node: fx.Node) -> str | None:
    """Return the name of the module that a node belongs to, from Dynamo's record of it."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        name = str(path).replace("L['self']", "").replace("_modules", "")
        name = ".".join(part for part in name.replace("['", ".").replace("']", "").split(".") if part)
        if name:
            return name
    return None


def op_name(target: object) -> str:
    """Return an op's name, in the form of `splitting_ops()`, or "" for what is no op."""
    if isinstance(target, _torch.OpOverload):
        return str(target.name()).removesuffix(".default")
    return str(target).replace(".", "::", 1) if isinstance(target, _torch.OpOverloadPacket) else ""


def copies(module: fx.GraphModule) -> Iterator[tuple[str, int, tuple[SourceLocation, ...]]]:
    """Return the clones that a graph after Inductor's passes makes for a mutating op: op, bytes, stack."""
    for node in module.graph.nodes:
        if node.target is not torch.ops.aten.clone.default:
            continue
        for user in _users_through_views(node):
            schema = _torch.schema(user.target)
            is_triton = "triton_kernel_wrapper" in getattr(user.target, "__name__", "")
            if is_triton or (schema is not None and schema.is_mutable and not _is_aten(user.target)):
                value = node.meta.get("val")
                size = value.numel() * value.element_size() if isinstance(value, Tensor) else 0
                op = _triton_name(user) if is_triton else op_name(user.target)
                yield op, size if isinstance(size, int) else int(getattr(size.node, "hint", 0) or 0), stack_of(user)
                break


def _is_aten(target: Any) -> bool:
    return str(getattr(target, "namespace", "")) in ("aten", "prims")


def _users_through_views(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if isinstance(user.target, _torch.OpOverload) and user.target.is_view:
            yield from _users_through_views(user)
        else:
            yield user
