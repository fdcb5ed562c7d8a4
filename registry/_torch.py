"""Every private name of torch that the registry uses, each behind a function that works without it, if slower.

`PRIVATE` lists the names. A name that has gone is warned about once, when it is first needed.
"""

import pkgutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])
_C, _AUTOGRAD, _FUNCTORCH = torch._C, torch._C._autograd, torch._C._functorch

PRIVATE = (
    "torch._C._dynamo.guards:TensorGuards",
    "torch._ops:OpOverload._op",
    "torch._dynamo:mark_dynamic",
    "torch._dynamo.decorators:_dynamo_marked_constant",
    "torch._C:_cuda_getCurrentRawStream",
    "torch._C:_xpu_getCurrentRawStream",
    "torch._inductor.cudagraph_trees:CUDAGraphNode._record",
    "torch._inductor.config:custom_should_partition_ops",
    "torch.multiprocessing.reductions:StorageWeakRef",
    "torch.library:Library._destroy",
    "torch._C:_AutoDispatchBelowAutograd",
    "torch._C:_increment_version",
    "torch._C._functorch:peek_interpreter_stack",
    "torch._C._functorch:is_functorch_wrapped_tensor",
    "torch.autograd.forward_ad:_current_level",
    "torch._C._autograd:_profiler_enabled",
    "torch._C:_is_torch_function_mode_enabled",
    "torch._ops:OpOverload.py_impl",
    "torch.fx.experimental.proxy_tensor:get_proxy_mode",
)
"""`module:name` of each; `_dynamo_marked_constant` is a word in that module's source."""


@cache
def _warn_once(name: str, consequence: str) -> None:
    warnings.warn(f"this torch has no {name}: {consequence}", RuntimeWarning, stacklevel=3)


def _find(name: str, consequence: str) -> Any:
    """Return what one of the names stands for; None, after one warning of what follows, where it has gone."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        _warn_once(name, consequence)
        return None


def same_tensors(tensors: Sequence[Tensor], strided: Collection[int] = ()) -> Callable[..., bool]:
    """Return a function that tells whether other tensors have these sizes, dtypes, devices and gradient needs, and
    those with the numbers `strided` these strides.

    `TensorGuards`, with which Dynamo guards, compares them in C++. It also tells inference tensors apart.
    """
    guards = _find("torch._C._dynamo.guards:TensorGuards", "calls are compared in Python, which takes microseconds")
    if guards is None:
        known = _facts(tensors, strided)
        return lambda *others: _facts(others, strided) == known
    sizes: list[Any] = [list(t.shape) for t in tensors]
    strides: list[Any] = [list(t.stride()) if i in strided else [None] * t.dim() for i, t in enumerate(tensors)]
    check: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


def _facts(tensors: Sequence[Tensor], strided: Collection[int]) -> list[tuple[Any, ...]]:
    mode = torch.is_inference_mode_enabled()
    facts = [(t.size(), t.dtype, t.device, t.layout, t.requires_grad, t.is_inference(), mode) for t in tensors]
    return facts + [t.stride() for i, t in enumerate(tensors) if i in strided]


def dispatch_of(overload: Any) -> Callable[..., None]:
    """Return what calls torch's dispatcher for an overload, without the Python frame of `OpOverload.__call__`."""
    dispatch: Callable[..., None] | None = getattr(overload, "_op", None)
    if dispatch is None:
        _warn_once("OpOverload._op", "each call of an op has one Python frame more")
    return overload if dispatch is None else dispatch


def honour_decompositions(overload: Any) -> None:
    """Let a table of decompositions hold for an op, mutating ones included, while torch turns a program functional.

    torch asks the table for what is left after that, when an op that mutates has become another. What it asks before is
    whether the op is composite. So this one says that it is where the table has it.
    """
    register = getattr(overload, "py_impl", None)
    if register is None:
        _warn_once("OpOverload.py_impl", "programs keep ops that mutate when they are decomposed")
        return

    def decompose(*args: Any, **kwargs: Any) -> Any:
        entry = _decomposition_table().get(overload)
        if entry is None or entry is decompose or entry == overload.decompose:  # Inductor's has composite ops, as this
            return NotImplemented
        return entry(*args, **kwargs)

    register(torch._C.DispatchKey.CompositeImplicitAutograd)(decompose)


def honour_functional_decompositions(overloads: Iterable[Any]) -> None:
    """Do that for ops that mutate nothing, whose references mutate their results before torch asks its table.

    Inductor makes a table of all functional ops that are composite when it is imported, and then compiles none of those
    that has kernels of its own. So its table is made first.
    """
    with suppress(ImportError):
        import_module("torch._inductor.decomposition")
    for overload in overloads:
        if torch._C.DispatchKey.CompositeImplicitAutograd not in getattr(overload, "py_kernels", {}):
            honour_decompositions(overload)


def _decomposition_table() -> Mapping[Any, Callable[..., Any]]:
    """Return the table that the program being traced is decomposed by; an empty one without."""
    if (tracing := sys.modules.get("torch.fx.experimental.proxy_tensor")) is None:
        return {}
    if (find := getattr(tracing, "get_proxy_mode", None)) is None:
        _warn_once("proxy_tensor.get_proxy_mode", "programs keep ops that mutate when they are decomposed")
        return {}
    if (mode := find()) is None:
        return {}
    table = getattr(mode, "decomposition_table", None)  # that of the mode; in torch 2.11 and 2.12 a global one
    found: Mapping[Any, Callable[..., Any]] = (
        getattr(tracing, "CURRENT_DECOMPOSITION_TABLE", {}) if table is None else table
    )
    return found


def mark_dynamic(tensor: Tensor) -> None:
    """Let Dynamo treat dimension 0 as a size that varies."""
    mark = _find("torch._dynamo:mark_dynamic", "the first change of the selection recompiles a graph once")
    if mark is not None:
        mark(tensor, 0)


def constant(function: F) -> F:
    """Let Dynamo call a function while it traces, instead of tracing it: its result is a constant, its error raised.

    `torch.compiler.assume_constant_result` does that, and imports Dynamo. The attribute that it sets is set here.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    if not _dynamo_reads_the_mark():
        _warn_once("_dynamo_marked_constant", "importing this package imports Dynamo")
        return torch.compiler.assume_constant_result(function)  # type: ignore[no-any-return]
    return function


@cache
def _dynamo_reads_the_mark() -> bool:
    spec = find_spec("torch")  # not `torch._dynamo`: finding that would import it
    sources = [Path(f) / "_dynamo" / "decorators.py" for f in (spec and spec.submodule_search_locations) or []]
    return any(s.is_file() and "._dynamo_marked_constant" in s.read_text(encoding="utf-8") for s in sources)


def current_stream_of(device: torch.device) -> Callable[[int], int] | None:
    """Return the function that gives a device index's current stream as a number, 0 for the default; None without."""
    return getattr(torch._C, f"_{device.type}_getCurrentRawStream", None)


def inductor_records() -> bool:
    """Return whether it is Inductor that captures a graph in this thread now: whether its function for that is running.

    Whose stream is current would not tell: a thread may record with what Inductor made for another one.
    """
    if (trees := sys.modules.get("torch._inductor.cudagraph_trees")) is None:
        return False
    record = getattr(getattr(trees, "CUDAGraphNode", None), "_record", None)
    if record is None:
        _warn_once("CUDAGraphNode._record", "a swap may warn of graphs that torch records anew by itself")
        return False
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        if caller.f_code is record.__code__:
            return True
        frame = caller
    return False


def partition_at(names: list[str]) -> dict[str, Any]:
    """Return the options of Inductor's that partition graphs at these ops, besides those at which it does so already.

    Raises:
        RuntimeError: Inductor has no such option.
    """
    config = import_module("torch._inductor.config")
    if not hasattr(config, "custom_should_partition_ops"):
        raise RuntimeError("this torch's Inductor has no option custom_should_partition_ops; split graphs instead")
    return {"graph_partition": True, "custom_should_partition_ops": [*config.custom_should_partition_ops, *names]}


def weak_storage(tensor: Tensor) -> Callable[[], bool]:
    """Return a function that tells whether a tensor's memory is still alive."""
    weak = _find("torch.multiprocessing.reductions:StorageWeakRef", "caches in a backend's own layout are kept alive")
    storage = tensor.untyped_storage()
    if weak is None:
        return lambda: storage.nbytes() >= 0
    reference = weak(storage)
    return lambda: not reference.expired()


def increment_version() -> Callable[[tuple[Tensor, ...]], None]:
    """Return what tells autograd that tensors were written; it passes over those of inference mode."""
    increment: Callable[[tuple[Tensor, ...]], None] | None = getattr(torch._C, "_increment_version", None)
    if increment is None:
        _warn_once("_increment_version", "each call of an op that writes takes a little longer")
        return torch.autograd.graph.increment_version
    return increment


def below_autograd() -> AbstractContextManager[object]:
    """Return a context in which ops go past autograd, that is already recording them."""
    guard = getattr(torch._C, "_AutoDispatchBelowAutograd", None)
    if guard is None:
        _warn_once("_AutoDispatchBelowAutograd", "recording a gradient takes microseconds more")
        return nullcontext()
    context: AbstractContextManager[object] = guard()
    return context


def is_watched() -> bool:
    """Return whether a profiler or a TorchFunctionMode follows what torch's dispatcher calls, or tensors may carry
    tangents.
    """
    try:  # in one expression, as every call asks
        return forward_ad._current_level >= 0 or _AUTOGRAD._profiler_enabled() or _C._is_torch_function_mode_enabled()
    except AttributeError:
        return _is_watched_without_a_name()


def _is_watched_without_a_name() -> bool:
    if _forward_level() >= 0:
        return True
    try:
        return _AUTOGRAD._profiler_enabled() or _C._is_torch_function_mode_enabled()
    except AttributeError:
        _warn_once("_profiler_enabled", "every call takes the dispatcher, which takes microseconds")
        return True


def is_transformed() -> bool:
    """Return whether a transform of torch.func (grad, vmap, jvp) or forward-mode differentiation is in force."""
    try:  # in one expression, as many calls ask
        return forward_ad._current_level >= 0 or _FUNCTORCH.peek_interpreter_stack() is not None
    except AttributeError:
        return _has_transform() or _forward_level() >= 0


@constant
def is_transform_traced() -> bool:
    """Return, in traced code, whether Dynamo traces such a transform: while it does, it is in force."""
    return is_transformed()


def _has_transform() -> bool:
    try:
        return _FUNCTORCH.peek_interpreter_stack() is not None
    except AttributeError:
        _warn_once("peek_interpreter_stack", "calls under torch.func are not told from others, and are refused by it")
        return False


def _forward_level() -> int:
    try:
        return forward_ad._current_level
    except AttributeError:
        _warn_once("forward_ad._current_level", "forward-mode differentiation is not noticed outside torch.func")
        return -1


def is_wrapped(tensor: Tensor) -> bool:
    """Return whether a tensor stands for another one under a transform of torch.func, or has a tangent."""
    if not is_transformed():
        return False
    wraps = _find("torch._C._functorch:is_functorch_wrapped_tensor", "every call under torch.func is refused by decode")
    return wraps is None or wraps(tensor) or has_tangent(tensor)


def has_tangent(tensor: Tensor) -> bool:
    """Return whether a tensor has a tangent of forward-mode differentiation.

    Sparse ones have none and may not be asked, nor may fake ones and others that answer for themselves: that ends in an
    assertion of torch's.
    """
    if tensor.layout is not torch.strided or answers_for_itself(tensor):
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def answers_for_itself(tensor: Tensor) -> bool:
    """Return whether a tensor is of a class with operators of its own, as fake and distributed ones are."""
    return bool(type(tensor).__torch_dispatch__ != Tensor.__torch_dispatch__)


def destroy(library: torch.library.Library) -> None:
    """Take a library's ops out of torch again."""
    if hasattr(library, "_destroy"):
        library._destroy()
    else:
        _warn_once("Library._destroy", "the ops of a namespace that was removed stay in torch")


def schema_name(target: Any) -> str:
    """Return `namespace::op` of an overload or of a packet of overloads, or "" for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    return target._qualified_op_name if isinstance(target, torch._ops.OpOverloadPacket) else ""
