"""Traces code for a device that this machine does not have: the graphs, the ops in them, and why each graph ended.

Fake tensors alone are not enough: indexing, `copy_` and `.to` ask c10 for the device's guard, and an absent device
has none. `install` gives it one that does nothing. This cannot be undone, so `run` does the work in a child process.
Dynamo and AOTAutograd can be traced so, under `no_grad`; Inductor, gradients, streams and values cannot.
"""

import contextlib
import copy
import ctypes
import dataclasses
import functools
import json
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mamba_ops.audit import _torch

_T = TypeVar("_T")

_TORCH = Path(torch.__file__).parent
_GUARD_TABLE = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
_INDEX = {"cpu": 0, "cuda": 1, "xpu": 12, "meta": 14}  # into that table: c10/core/DeviceType.h


@dataclasses.dataclass(frozen=True)
class Graph:
    """The ops called in one graph, in order: as Dynamo captured it, and as AOTAutograd lowered it."""

    ops: list[str]
    aot_ops: list[str]


@dataclasses.dataclass(frozen=True)
class Break:
    """Where a graph had to end, as `file:line` of the code traced, and Dynamo's reason."""

    where: str
    reason: str


@dataclasses.dataclass
class Trace:
    """What was seen in the calls of one `Tracer`.

    Args:
        graphs: in the order of compilation; a recompile adds its own.
        breaks: each location once.
        recompiles: for each recompile, the function's name and the guard that failed.
        stopped: None, or why the last call ended early: between two graphs Python asked for values, and a fake tensor
            has none. What comes after was not seen.
    """

    device: str
    graphs: list[Graph] = dataclasses.field(default_factory=list)
    breaks: list[Break] = dataclasses.field(default_factory=list)
    recompiles: list[str] = dataclasses.field(default_factory=list)
    stopped: str | None = None


class ChildError(RuntimeError):
    """The child process of `run` failed; the message ends in its output."""


def trace(fn: Callable[..., Any], *args: Any, device: str = "xpu", dynamic: bool | None = None, **kwargs: Any) -> Trace:
    """Trace one call `fn(*args, **kwargs)` as if its tensors were on `device`. For several calls, see `Tracer`."""
    tracer = Tracer(fn, device=device, dynamic=dynamic)
    tracer(*args, **kwargs)
    return tracer.trace


class Tracer:
    """Called like a function or module, traces the call; `trace` holds the result of the calls so far.

    The function (its copy is `fn`) and its arguments are copied by `fake`, so that their tensors are on `device`. Pass
    the result of `fake` for a tensor that must stay on the host, or be the same tensor in several calls. Tensors that a
    function closes over are not replaced. A new tracer resets Dynamo and its counts: use one at a time.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        device: str = "xpu",
        dynamic: bool | None = None,
        on_assumption: Callable[[str], None] | None = None,
    ) -> None:
        """`on_assumption` is called with an op whose values were taken to be 1; None stops the call there."""
        install(device)
        self._on_assumption = on_assumption
        torch.compiler.reset()
        self.trace = Trace(device)
        self.fn = fake(fn, device)
        self._compiled = torch.compile(self.fn, backend=self._backend, dynamic=dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns, with fake tensors; None if the call stopped early."""
        args, kwargs = fake((args, kwargs), self.trace.device)
        # AOTAutograd computes with small constants on their own device; this one cannot.
        no_constants = _torch.patched("torch.fx.experimental.proxy_tensor:CONSTANT_NUMEL_LIMIT", -1)
        self.trace.stopped = None
        _torch.forget_compiles()
        try:
            with torch.no_grad(), fake_mode(), no_constants, assuming(self._on_assumption):
                return self._compiled(*args, **kwargs)
        except _torch.needs_values_errors() as error:
            self.trace.stopped = f"{error.func} needs values, which a fake tensor does not have"
        finally:
            self._collect()

    def _backend(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = Graph(_ops(module), [])
        compiled: Callable[..., Any] = _torch.lower(module, inputs, lambda lowered: graph.aot_ops.extend(_ops(lowered)))
        self.trace.graphs.append(graph)  # not before: AOTAutograd may send Dynamo back for another attempt
        return compiled

    def _collect(self) -> None:
        breaks, recompiles = _torch.compiles()
        self.trace.recompiles += [f"{again.function}: {again.guard}" for again in recompiles]
        for broken in breaks:
            where = _location(broken.stack)
            if where not in {known.where for known in self.trace.breaks}:
                self.trace.breaks.append(Break(where, broken.reason))


def _ops(module: torch.fx.GraphModule) -> list[str]:
    return [_name(node) for node in module.graph.nodes if node.op.startswith("call_")]


def _name(node: torch.fx.Node) -> str:
    name = str(node.target) if isinstance(node.target, _torch.OPERATORS) else _torch.node_name(node)
    wrapped = [str(arg) for arg in node.args if isinstance(arg, _torch.OpOverload)]
    return f"{name}({wrapped[0]})" if wrapped else name  # auto_functionalized_v2(the op)


def _location(stack: Sequence[traceback.FrameSummary]) -> str:
    if not stack:
        return "unknown"
    outside_torch = [frame for frame in stack if not Path(frame.filename).is_relative_to(_TORCH)]
    innermost = (outside_torch or stack)[-1]
    return f"{innermost.filename}:{innermost.lineno}"


def fake(value: _T, device: str) -> _T:
    """Return a deep copy of `value` with a fake tensor on `device`, without gradients, for every real one.

    Shapes, strides, dtypes, shared storage, and marks such as `mark_dynamic`'s are kept; parameters stay parameters.
    No memory is copied. Fake tensors are kept as they are.
    """
    with torch.no_grad(), _DeepCopyFakes(device):
        return copy.deepcopy(value)


@functools.cache
def fake_mode() -> Any:
    """Return the mode in which fake tensors made by `fake` run; the one of the process."""
    # Where another accelerator is present, torch would initialise the absent one.
    _torch.set_value("torch._subclasses.fake_tensor:init_gpu_context", lambda device: None)
    mode = _torch.require("torch._subclasses.fake_tensor:FakeTensorMode")
    shapes = _torch.find("torch.fx.experimental.symbolic_shapes:ShapeEnv")
    if shapes is not None:  # while_loop asks the mode for one; what is read between two graphs stays a number
        shapes = shapes(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    made = mode(allow_non_fake_inputs=True, shape_env=shapes)
    made.dispatch = functools.partial(_dispatch, made.dispatch)
    return made


_MOST = 10**7  # elements of a tensor whose values are assumed
_assumes: list[Callable[[str], None]] = []


@contextlib.contextmanager
def assuming(tell: Callable[[str], None] | None) -> Iterator[None]:
    """Within the block, values of fake tensors that Python asks for are 1, outside of graphs."""
    if tell is not None:
        _assumes.append(tell)
    try:
        yield
    finally:
        if tell is not None:
            _assumes.remove(tell)


def _dispatch(dispatch: Callable[..., Any], func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    try:
        return dispatch(func, types, args, kwargs)
    except _torch.needs_values_errors():
        tensors = _torch.tensors_in((args, kwargs or {}))
        if not _assumes or _is_tracing() or any(tensor.numel() > _MOST for tensor in tensors):
            raise
        _assumes[-1](str(func))
        return _with_ones(func, args, kwargs or {})


def _with_ones(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what an op returns for tensors of ones, as fakes on the device of the tensors given."""
    device = next(tensor.device for tensor in _torch.tensors_in((args, kwargs)))
    with _without_fake_modes():
        args, kwargs = _torch.map_tensors(
            lambda tensor: torch.ones(tuple(tensor.shape), dtype=tensor.dtype), (args, kwargs)
        )
        return fake(func(*args, **kwargs), device.type)


def _is_tracing() -> bool:
    """Return whether Dynamo or AOTAutograd traces a graph now; True where this torch does not say."""
    get = _torch.find("torch._guards:TracingContext.try_get")
    return get is None or get() is not None


def _without_fake_modes() -> contextlib.AbstractContextManager[Any]:
    """Within this, ops run on real tensors."""
    unset: Callable[[], contextlib.AbstractContextManager[Any]] | None = _torch.find(
        "torch._subclasses.fake_tensor:unset_fake_temporarily"
    )
    return unset() if unset is not None else contextlib.nullcontext()


class _DeepCopyFakes(TorchFunctionMode):
    """Inside, `copy.deepcopy` makes fake tensors."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.fake_tensor = _torch.require("torch._subclasses.fake_tensor:FakeTensor")
        self.device = torch.device(device)
        self.storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A tensor copies itself in `__deepcopy__`; a parameter as `type(self)(self.data.clone(), self.requires_grad)`.
        if func in (Tensor.__deepcopy__, Tensor.clone):
            return self.fake(args[0])
        if func == Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
            return False
        return func(*args, **(kwargs or {}))

    def fake(self, tensor: Tensor) -> Any:
        if isinstance(tensor, self.fake_tensor):
            return tensor
        real = tensor.untyped_storage()
        # The real one is kept, so that its key stays its own.
        new = real, torch.UntypedStorage(real.nbytes(), device="meta")
        _, storage = self.storages.setdefault(_torch.storage_key(real), new)
        meta = torch.empty(0, dtype=tensor.dtype, device="meta")
        meta.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        result = self.fake_tensor(fake_mode(), meta, self.device)
        vars(result).update(vars(tensor))
        return result


_installed: dict[str, str] = {}


def install(device_type: str, *, compiler: bool = True) -> str:
    """Give an absent device a guard that does nothing, once and for the rest of the process.

    Args:
        device_type: "cuda" or "xpu".
        compiler: whether to try a C++ compiler. Without one the device borrows the guard of the meta device, through
            a symbol that torch does not promise to keep.

    Returns "compiled" or "borrowed".

    Raises:
        ValueError: it is another device.
        RuntimeError: the device is present, or this torch cannot be given a guard, or has no fake tensors.
    """
    if device_type not in ("cuda", "xpu"):
        raise ValueError(f"device: got {device_type!r}, expected 'cuda' or 'xpu'")
    if device_type in _installed:
        return _installed[device_type]
    if torch.get_device_module(device_type).is_available():
        raise RuntimeError(f"{device_type} is present on this machine: audit it as usual")
    for name in ("FakeTensor", "FakeTensorMode"):
        _torch.require(f"torch._subclasses.fake_tensor:{name}")
    how = "compiled" if compiler and _compile_guard(device_type) else "borrowed"
    if how == "borrowed":
        _borrow_guard(device_type)
    # torch checks for any accelerator; a present one must not make it put constants on the absent device.
    _torch.set_value("torch._subclasses.fake_tensor:FakeTensorMode.avoid_device_init", True)
    if device_type == "xpu":
        _use_math_attention()
    return _installed.setdefault(device_type, how)


def _compile_guard(device_type: str) -> bool:
    """Load the guard's library, built once per user and torch; False where that cannot be done."""
    name = device_type.upper()
    source = (
        "#include <c10/core/impl/DeviceGuardImplInterface.h>\n"
        f"C10_REGISTER_GUARD_IMPL({name}, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::{name}>)\n"
    )
    build = f"{torch.__version__}-{torch.version.git_version[:8]}-{platform.machine()}"
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mamba_ops"
        library = cache / f"absent-{device_type}-{build}.so"
        if not library.exists() and compiler:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                built = Path(folder, library.name)
                command = [compiler, "-std=c++20", "-shared", "-fPIC", "-o", str(built), f"-I{_TORCH / 'include'}"]
                command += ["-x", "c++", "-", f"-L{_TORCH / 'lib'}", "-lc10"]
                subprocess.run(command, input=source.encode(), check=True, capture_output=True)
                built.replace(library)  # in one step: other processes may be looking for it
        ctypes.CDLL(str(library))  # registers the guard
    except (OSError, RuntimeError, subprocess.CalledProcessError):  # RuntimeError: there is no home folder
        return False
    return True


def _borrow_guard(device_type: str) -> None:
    try:
        table = (ctypes.c_void_p * 15).in_dll(ctypes.CDLL(torch._C.__file__), _GUARD_TABLE)
    except ValueError as error:
        raise RuntimeError(
            f"torch {torch.__version__} has no symbol {_GUARD_TABLE}, so {device_type} can only be traced "
            "where a C++ compiler builds its guard: install g++"
        ) from error
    if not (table[_INDEX["cpu"]] and table[_INDEX["meta"]]):  # both are registered in every build
        raise RuntimeError(f"{_GUARD_TABLE} in torch {torch.__version__} is not the table of device guards any more")
    table[_INDEX[device_type]] = table[_INDEX["meta"]]


@functools.cache
def _use_math_attention() -> torch.library.Library:
    """Make xpu's attention the math op: the device chooses among fused kernels, and it is not present."""

    def attention(q: Any, k: Any, v: Any, mask: Any = None, p: float = 0.0, causal: bool = False, **kwargs: Any) -> Any:
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, p, causal, **kwargs)[0]

    library = torch.library.Library("aten", "IMPL")
    for key in ("XPU", "AutogradXPU"):
        library.impl("scaled_dot_product_attention", attention, key)
    return library  # kept: a library that is collected takes its kernels away


_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from mamba_ops.audit import absent; absent._child()"
)


def run(target: str, *args: Any, device: str = "xpu", timeout: float = 600.0, **kwargs: Any) -> Any:
    """Call `target`, as in "module:function", in a child process where `device` is installed; return its result.

    The child calls `function(*args, device=device, **kwargs)`. Arguments and result travel as JSON, a `Trace` or any
    other dataclass as a dict. What the child prints goes to stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer_file = Path(folder, "answer.json")
        child = subprocess.run(
            [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), str(answer_file)],
            input=json.dumps([target, device, args, kwargs]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if not answer_file.exists():
            raise ChildError(f"{target}: the child process died with code {child.returncode}\n{child.stdout}")
        answer = json.loads(answer_file.read_text())
    sys.stderr.write(child.stdout)
    if "error" in answer:
        raise ChildError(f"{target} failed in the child process\n{answer['error']}")
    return answer["result"]


def _child() -> None:
    try:
        target, device, args, kwargs = json.load(sys.stdin)
        install(device)
        result = pkgutil.resolve_name(target)(*args, device=device, **kwargs)
        answer = json.dumps({"result": result}, default=dataclasses.asdict)
    except Exception:
        answer = json.dumps({"error": traceback.format_exc()})
    Path(sys.argv[2]).write_text(answer)
