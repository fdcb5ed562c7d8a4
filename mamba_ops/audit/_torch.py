"""Every private name of torch that the audit and the commands use, each behind a function that works without it.

`PRIVATE` lists the names, and what is lost in a torch that does not have one. The first use of a missing name warns of
that, once in a process, and reports end with the same sentence.
"""

import contextlib
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from traceback import FrameSummary
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import torch
from torch import Tensor, fx

from mamba_ops.audit.private_names import BREAKS as BREAKS
from mamba_ops.audit.private_names import CALLS as CALLS
from mamba_ops.audit.private_names import COPIES as COPIES
from mamba_ops.audit.private_names import CUDA_GRAPHS as CUDA_GRAPHS
from mamba_ops.audit.private_names import FAILURES as FAILURES
from mamba_ops.audit.private_names import GRAPHS as GRAPHS
from mamba_ops.audit.private_names import HAS_TRITON as HAS_TRITON
from mamba_ops.audit.private_names import LOOPS as LOOPS
from mamba_ops.audit.private_names import PRIVATE
from mamba_ops.audit.private_names import RECOMPILES as RECOMPILES

_missing: dict[str, str] = {}


class MissingNameError(RuntimeError):
    """This torch does not have a private name that has no fallback."""


def losses() -> list[str]:
    """Return a sentence for each private name that was needed and is not in this torch."""
    return [f"{sentence[:1].upper()}{sentence[1:]}." for sentence in _missing.values()]


def show_warnings() -> None:
    """Let the warnings of this file through, where others are ignored."""
    warnings.filterwarnings("always", "this torch has no", RuntimeWarning)


def find(name: str) -> Any:
    """Return what stands under a name of `PRIVATE`, or None, with a warning, if this torch does not have it."""
    module, _, path = name.partition(":")
    try:
        return functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return _warn_once(name)


def _attribute(instance: Any, name: str) -> Any:
    """Return an attribute of an instance of the class in a name, or None, with a warning."""
    try:
        return getattr(instance, name.rpartition(".")[2])
    except AttributeError:
        return _warn_once(name)


def _warn_once(name: str) -> None:
    if name not in _missing:
        _missing[name] = f"this torch has no {name.partition(':')[2]}: {PRIVATE[name].loss}"
        warnings.warn(_missing[name], RuntimeWarning, stacklevel=4)


def require(name: str) -> Any:
    """Return what stands under a name.

    Raises:
        MissingNameError: this torch does not have it.
    """
    found = find(name)
    if found is None:
        raise MissingNameError(_missing[name])
    return found


# -- replacing --------------------------------------------------------------------------------------------------------


def replace(stack: contextlib.ExitStack, name: str, around: Callable[..., Any]) -> bool:
    """Until the stack closes, call `around(original, *args, **kwargs)` for a function or method; False if it is gone.

    Modules that hold the function under the same name are changed too.
    """
    original = find(name)
    if original is None:
        return False

    def replaced(*args: Any, **kwargs: Any) -> Any:  # bound like the original where that is a method
        return around(original, *args, **kwargs)

    module, _, path = name.partition(":")
    owner, _, last = path.rpartition(".")
    for holder in (module, *PRIVATE[name].also_in):
        target: Any = importlib.import_module(holder)
        target = getattr(target, owner) if owner else target
        if hasattr(target, last):
            stack.enter_context(mock.patch.object(target, last, replaced))
    return True


def let_triton_be_found(stack: contextlib.ExitStack) -> None:
    """Until the stack closes, torch takes an installed Triton to be usable, as where its device is."""
    found = importlib.util.find_spec("triton") is not None
    replace(stack, HAS_TRITON, lambda original, **options: found)  # torch 2.15 asks with one


def set_value(name: str, value: Any) -> None:
    """Give a name of a module or class another value, for the rest of the process."""
    if find(name) is not None:
        module, _, path = name.partition(":")
        owner, _, last = path.rpartition(".")
        holder = importlib.import_module(module)
        setattr(getattr(holder, owner) if owner else holder, last, value)


@contextlib.contextmanager
def patched(name: str, value: Any) -> Iterator[None]:
    """Within the block, a name of a module or class has another value."""
    if find(name) is None:
        yield
        return
    module, _, path = name.partition(":")
    owner, _, last = path.rpartition(".")
    holder = importlib.import_module(module)
    with mock.patch.object(getattr(holder, owner) if owner else holder, last, value):
        yield


def intercept_ops(handler: Callable[[Any, Any, Any], Any]) -> contextlib.AbstractContextManager[Any]:
    """Within the block, call `handler(op, args, kwargs)` in place of each op that torch dispatches."""
    mode = find("torch.utils._python_dispatch:TorchDispatchMode")
    if mode is None:
        return contextlib.nullcontext()

    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return handler(func, args, kwargs or {})

    members = {
        "__torch_dispatch__": dispatch,
        "supports_higher_order_operators": True,  # cond, scan, flex_attention
        "ignore_compile_internals": classmethod(lambda cls: True),  # some of which compile themselves
    }
    intercepting: contextlib.AbstractContextManager[Any] = type("Intercepting", (mode,), members)()
    return intercepting


# -- records of Dynamo's ----------------------------------------------------------------------------------------------


class _NeverRaisedError(Exception):
    """Stands in an `except` for an error that this torch does not have."""


def unsupported_error() -> type[Any]:
    """Return the class of Dynamo's errors at a graph break."""
    return find("torch._dynamo.exc:Unsupported") or _NeverRaisedError


def is_compiler_error(error: Exception) -> bool:
    """Return whether Dynamo failed at what it traced, rather than going another way from there."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return "TorchDynamoException" not in names or bool(names & {"TorchRuntimeError", "UncapturedHigherOrderOpError"})


def end_graph(error: Exception) -> NoReturn:
    """End the graph before what Dynamo traces now, because of an error."""
    if (unimplemented := find("torch._dynamo.exc:unimplemented")) is not None:
        unimplemented(gb_type="error of the compiler", context="", explanation=str(error), hints=[])
    raise error


def needs_values_errors() -> tuple[type[Any], ...]:
    """Return the classes of errors that fake tensors raise where values are needed."""
    names = "DataDependentOutputException", "DynamicOutputShapeException"
    return tuple(find(f"torch._subclasses.fake_tensor:{name}") or _NeverRaisedError for name in names)


def recompile_limit() -> int:
    """Return how many versions of a function Dynamo makes."""
    return int(find("torch._dynamo.config:recompile_limit") or 8)


def flag(name: str) -> Any:
    """Return the value of a flag of Dynamo's, or None, if this torch does not have it."""
    return getattr(find("torch._dynamo:config"), name, None)


def flags(values: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Within the block, flags of Dynamo's have these values."""
    config = find("torch._dynamo:config")
    patched_config: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if config is not None and values:
        patched_config = config.patch(values)
    return patched_config


def traced_stack() -> Sequence[Any]:
    """Return the frames of the code that Dynamo traces now."""
    extract = find("torch._guards:TracingContext.extract_stack")
    return extract() if extract is not None else ()


def lowering_facts() -> Any:
    """Return AOTAutograd's metadata of the graph compiled last, such as the inputs it writes to; or None."""
    get = find("torch._guards:TracingContext.try_get")
    return getattr(get() if get is not None else None, "fw_metadata", None)


def compile_id() -> str:
    """Return Dynamo's name for what it compiles now, such as 0/1 for the second version of the first function."""
    current = find("torch._guards:CompileContext.current_compile_id")
    return str((current() if current is not None else None) or "?")


def triton_kernel(node: fx.Node) -> Any:
    """Return the kernel that a node launches, or None."""
    table = find("torch._higher_order_ops.triton_kernel_wrap:kernel_side_table")
    return table.get_kernel(node.kwargs["kernel_idx"]) if table is not None else None


class Break(NamedTuple):
    """A graph break, by Dynamo's lists: its reason, and the frames of the user's code, innermost last."""

    reason: str
    stack: Sequence[Any]


class Recompile(NamedTuple):
    """A recompile, by Dynamo's metrics: the function, where it is defined, and the guard that failed."""

    function: str
    file: str
    line: int
    guard: str


def forget_compiles() -> None:
    """Empty the lists that `compiles` reads."""
    if (reasons := find("torch._dynamo.utils:graph_break_reasons")) is not None:
        reasons.clear()
    if (set_limit := find("torch._dynamo.utils:set_compilation_metrics_limit")) is not None:
        set_limit(10_000)  # torch keeps 64 frames; a large model has more
    if (clear := find("torch._dynamo.utils:clear_compilation_metrics")) is not None:
        clear()


def compiles() -> tuple[list[Break], list[Recompile]]:
    """Return the graph breaks and recompiles since `forget_compiles`.

    Dynamo either compiles up to a break or gives a whole frame up, and keeps a list for each.
    """
    reasons = find("torch._dynamo.utils:graph_break_reasons") or ()
    breaks = [Break(broken.reason, broken.user_stack) for broken in reasons]
    recompiles = []
    for frame in _metrics():
        if frame.fail_reason:
            file, line = frame.fail_user_frame_filename, frame.fail_user_frame_lineno
            breaks.append(Break(frame.fail_reason, [FrameSummary(file, line, "")] if file else []))
        elif frame.recompile_reason:
            recompiles.append(Recompile(frame.co_name, frame.co_filename, frame.co_firstlineno, frame.recompile_reason))
    return breaks, recompiles


def compile_ids() -> list[str]:
    """Return the ids of what Dynamo compiled since `forget_compiles`."""
    return [str(frame.compile_id) for frame in _metrics()]


@contextlib.contextmanager
def traced_to(folder: str | None) -> Iterator[None]:
    """Within the block, torch.compile writes its structured trace to a folder, as with TORCH_TRACE."""
    logging_of_torch = find("torch._logging:_internal") if folder else None
    if logging_of_torch is None:
        yield
        return
    handler = logging_of_torch.LazyTraceHandler(folder)
    handler.setFormatter(logging_of_torch.TorchLogsFormatter(trace=True))
    logging_of_torch.trace_log.addHandler(handler)
    try:
        yield
    finally:
        logging_of_torch.trace_log.removeHandler(handler)
        handler.close()


def _metrics() -> Sequence[Any]:
    get = find("torch._dynamo.utils:get_compilation_metrics")
    return get() if get is not None else ()


def graph_count() -> int:
    """Return how many graphs Dynamo has made in this process."""
    counters = find("torch._dynamo.utils:counters")
    return int(counters["stats"]["unique_graphs"]) if counters is not None else 0


@contextlib.contextmanager
def on_compile(begin: Callable[[str, str], None], end: Callable[[str, str], None] = lambda *_: None) -> Iterator[bool]:
    """Within the block, call these with the trigger and the id of each compile; False where torch does not say."""
    with contextlib.ExitStack() as stack:
        if (handler := find("torch._dynamo.callback:callback_handler")) is not None:
            for note, name in ((begin, "run_start_callbacks"), (end, "run_end_callbacks")):  # a reset empties its lists
                around = functools.partial(_tell, note, getattr(handler, name))
                stack.enter_context(mock.patch.object(handler, name, around))
        yield handler is not None


def _tell(note: Callable[[str, str], None], run: Callable[[Any], None], event: Any) -> None:
    note(event.callback_trigger.name, event.compile_id)
    run(event)


def guard_parts(version: Any) -> tuple[Sequence[str], dict[str, Any]]:
    """Return the guards of a compiled version as Python expressions, and the names in them other than `L`."""
    manager = version.guard_manager
    if find("torch._dynamo.guards:GuardManagerWrapper") is None or manager.global_scope is None:
        return (), {}
    sizes = [part for guard in manager.root.get_epilogue_lambda_guards() for part in guard.verbose_code_parts()]
    parts = [*manager.code_parts, *(part.partition("  #")[0] for part in sizes)]
    return parts, manager.global_scope | manager.closure_vars


# -- tensors, ops and nodes -------------------------------------------------------------------------------------------


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, dicts, and other containers registered with torch."""
    leaves = find("torch.utils._pytree:tree_leaves") or _leaves
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for item in tree for leaf in _leaves(item)] if isinstance(tree, (tuple, list)) else [tree]


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return the same nested containers with `function` of each tensor."""
    found = find("torch.utils._pytree:tree_map_only")
    return found(Tensor, function, tree) if found is not None else _map(function, tree)


def _map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return type(tree)((key, _map(function, value)) for key, value in tree.items())
    if isinstance(tree, (tuple, list)):
        items = [_map(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


OpOverload = type(torch.ops.aten.clone.default)
OpOverloadPacket = type(torch.ops.aten.clone)
OPERATORS = (*OpOverload.__bases__[:1], OpOverloadPacket)  # higher-order operators have that base too


def schema(op: Any) -> Any:
    """Return an op's schema, or None for what has none."""
    return _attribute(op, "torch._ops:OpOverload._schema") if isinstance(op, OpOverload) else None


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that identifies a storage's memory while one of its storages is alive."""
    key = _attribute(storage, "torch.storage:UntypedStorage._cdata")
    return int(key) if key is not None else storage.data_ptr() or id(storage)


def node_name(node: fx.Node) -> str:
    """Return what a node calls, with its module."""
    printed = _attribute(node, "torch.fx:Node._pretty_print_target")
    return str(printed(node.target) if printed is not None else getattr(node.target, "__name__", node.target))


def lower(module: fx.GraphModule, inputs: Sequence[Any], record: Callable[[fx.GraphModule], None]) -> Any:
    """Return what runs a graph of Dynamo's; `record` is given the graph that AOTAutograd makes of it."""
    aot_autograd = find("torch._dynamo.backends.common:aot_autograd")
    if aot_autograd is None:
        return module.forward

    def compiled(lowered: fx.GraphModule, _: Sequence[Any]) -> Any:
        record(lowered)
        return lowered.forward

    return aot_autograd(fw_compiler=compiled)(module, inputs)
