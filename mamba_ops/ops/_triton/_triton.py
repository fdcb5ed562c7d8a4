"""Every private or unstable name of Triton that this package uses, each behind a function that works without it.

`PRIVATE` lists the names. A name that has gone is warned about once, when it is first needed. Triton is imported inside
functions, so that what can do without it may import this module.
"""

import hashlib
import importlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch

DRIVER = "triton.runtime:driver.active"
LOAD = "triton.runtime.jit:JITFunction._do_compile"
TUNE = "triton.runtime.autotuner:Autotuner._bench"
PRELOAD = "triton.runtime.jit:JITFunction.preload"
CACHES = "triton.runtime.jit:JITFunction.device_caches"
BEFORE_LOAD = "triton:knobs.runtime.jit_cache_hook"
LOADED = "triton:knobs.compilation.listener"
COMPILED = "triton:knobs.runtime.jit_post_compile_hook"
CACHE_DIR = "triton:knobs.cache.dir"
CALLEE = "triton.runtime.jit:DependenciesFinder._update_hash"
HASH = "triton.runtime.cache:triton_key"
ON_DISK = (
    "triton.compiler.compiler:ASTSource",
    "triton.compiler.compiler:make_backend",
    "triton.runtime.cache:get_cache_key",
    "triton.runtime.cache:get_cache_manager",
    "triton.runtime.jit:get_cache_invalidating_env_vars",
)
TARGET = "triton.backends.compiler:GPUTarget"
LIBRARY = "triton._C:libtriton"
RUN = "triton.runtime.jit:JITFunction.run"
KERNEL = "triton.compiler.compiler:CompiledKernel.run"
LAUNCH_HOOKS = ("triton:knobs.runtime.launch_enter_hook", "triton:knobs.runtime.launch_exit_hook")
FAILURES = (
    "triton.compiler.errors:CompilationError",
    "triton.runtime.errors:OutOfResources",
    "triton.runtime.errors:PTXASError",
)
PRIVATE = (
    *(DRIVER, LOAD, TUNE, PRELOAD, CACHES, LIBRARY, RUN, KERNEL, *LAUNCH_HOOKS, *FAILURES),
    *(BEFORE_LOAD, LOADED, COMPILED, CACHE_DIR, CALLEE, HASH, TARGET, *ON_DISK),
)
"""`module:name` of each. Instances alone have `device_caches`."""
SPLAT = "triton.runtime.interpreter:InterpreterBuilder.create_splat"
"""Private, too; Triton's interpreter itself does not run without it."""

LAUNCHERS = ["triton.backends.nvidia.driver"]
"""Drivers that make launchers without a GPU; of others that is not known."""


_GONE = object()


@cache
def _warn_once(name: str, consequence: str) -> None:
    warnings.warn(f"this Triton has no {name}: {consequence}", RuntimeWarning, stacklevel=3)


def named(module: str, name: str) -> Any:
    """Return what a module has under a dotted name."""
    return reduce(getattr, name.split("."), importlib.import_module(module))


def _find(path: str, consequence: str) -> Any:
    """Return what Triton has under a private name; else warn of the consequence, once, and return _GONE."""
    try:
        return named(*path.split(":"))
    except (ImportError, AttributeError):
        _warn_once(path.partition(":")[2], consequence)
        return _GONE


# -- devices and files ------------------------------------------------------------------------------------------------


def device_family() -> str:
    """Return the name of the current device's family, which runs the same binaries (`cuda-90`, `hip-gfx942`)."""
    if (driver := _find(DRIVER, "devices are named after what torch says of them")) is not _GONE:
        target = driver.get_current_target()
        # On XPU `arch` holds all of the device's properties.
        arch = target.arch.get("name", "") if isinstance(target.arch, dict) else target.arch
        return f"{target.backend}-{re.sub('[^0-9A-Za-z.]+', '-', str(arch)).strip('-')[:40]}"
    if (device := torch.accelerator.current_accelerator(check_available=True)) is None:
        return "cpu"
    properties = torch.get_device_module(device).get_device_properties()
    if hasattr(properties, "gcnArchName"):
        return f"hip-{properties.gcnArchName.partition(':')[0]}"
    return f"{device.type}-{getattr(properties, 'major', '')}{getattr(properties, 'minor', '')}"


def limit_of_shared_memory() -> int | None:
    """Return how many bytes of shared memory a program may have on the current device; None: not known."""
    consequence = "how much shared memory a device has is asked of torch"
    if (driver := _find(DRIVER, consequence)) is not _GONE:
        try:
            return int(driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"])
        except (AttributeError, KeyError, TypeError):
            _warn_once("max_shared_mem", consequence)
    if (device := torch.accelerator.current_accelerator(check_available=True)) is None:
        return None
    properties = torch.get_device_module(device).get_device_properties()
    names = ("shared_memory_per_block_optin", "local_mem_size")
    return next((getattr(properties, name) for name in names if hasattr(properties, name)), None)


def dot_precisions() -> tuple[str, ...]:
    """Return the precisions in which Triton multiplies float32 matrices on the current device: see `tl.dot`."""
    found = [_find(path, "float32 is multiplied without matrix units") for path in (DRIVER, ON_DISK[1])]
    if _GONE not in found:
        driver, make_backend = found
        asked = {"enable_fp_fusion": True}  # as launches do; Triton 3.9 warns where it is not said
        return tuple(make_backend(driver.get_current_target()).parse_options(asked).allowed_dot_input_precisions)
    return ("ieee",)


def matrix_units() -> str:
    """Return which matrices are multiplied by units of their own on the current device: "" (none), "parts" (numbers of
    2 bytes, and float32 in parts) or "float32" (that whole, too).
    """
    if (driver := _find(DRIVER, "devices are taken to multiply float32 in parts")) is _GONE:
        return "parts"
    target = driver.get_current_target()
    if target.backend == "cuda" and target.arch < 80:  # Triton knows NVIDIA's from Ampere on
        return ""
    return "float32" if target.backend == "hip" and target.warp_size == 64 else "parts"  # CDNA has them


def cache_dir() -> Path:
    """Return the folder in which Triton keeps what it compiled."""
    if (found := _find(CACHE_DIR, "its cache is taken to be in TRITON_CACHE_DIR, or in ~/.triton")) is not _GONE:
        return Path(found)
    default = Path(os.environ.get("TRITON_HOME", Path.home()), ".triton", "cache")
    return Path(os.environ.get("TRITON_CACHE_DIR", default))


def hash_sources() -> None:
    """Hash Triton's own files, as every key of its cache needs; Triton remembers the hash."""
    if (hash_files := _find(HASH, "its files are hashed at the first launch instead")) is not _GONE:
        hash_files()


def is_on_disk(function: Any, asked: Any) -> bool:
    """Whether Triton's cache has the variant of a kernel that `jit_cache_hook` was called for."""
    found = [_find(path, "a warm-up has kernels compiled that are on disk already") for path in (DRIVER, *ON_DISK)]
    if _GONE in found:
        return False
    *_, get_cache_key, get_cache_manager, get_env = found
    source, backend, options = _source(function, asked)
    key = get_cache_key(source, backend, options, env_vars=get_env())
    name = f"{source.name[:150]}.json"
    group = get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(name)
    return bool(group) and name in group


def _source(function: Any, asked: Any) -> tuple[Any, Any, Any]:
    """Return what Triton compiles for a variant that `jit_cache_hook` was called for, its compiler, and its options."""
    ast_source, make_backend = (named(*path.split(":")) for path in ON_DISK[:2])
    backend = make_backend(named(*DRIVER.split(":")).get_current_target())
    options = json.loads(asked["specialization_data"])["options"]
    options = backend.parse_options({n: tuple(v) if isinstance(v, list) else v for n, v in options.items()})
    ast_source = getattr(function, "ASTSource", ast_source)  # Gluon's kernels have another
    return ast_source(function, asked["signature"], asked["constants"], asked["configs"][0]), backend, options


# -- what a kernel asks of a GPU --------------------------------------------------------------------------------------


def compiled(function: Any, asked: Any) -> Any:
    """Compile a variant that `jit_cache_hook` was called for, and return it: see its `metadata` and `asm`."""
    from triton.compiler import compile

    source, backend, options = _source(function, asked)
    return compile(source, target=backend.target, options=vars(options))


def shared_memory(function: Any, asked: Any) -> int:
    """Return the bytes of shared memory of a variant that `jit_cache_hook` was called for.

    It is compiled up to the pass that allocates them, which takes a tenth of the time. Where this Triton's passes have
    other names, it is compiled altogether.
    """
    consequence = "how much shared memory a kernel takes is found by compiling all of it, which takes ten times as long"
    if (library := _find(LIBRARY, consequence)) is not _GONE:
        source, backend, options = _source(function, asked)
        try:
            manager, module = _up_to_allocation(library, source, backend, options)
        except AttributeError:
            _warn_once("passes of these names", consequence)
        else:
            manager.run(module, "allocate")
            return int(module.get_int_attr("ttg.shared"))
    return int(compiled(function, asked).metadata.shared)


def _up_to_allocation(library: Any, source: Any, backend: Any, options: Any) -> tuple[Any, Any]:
    """Return the passes that end with the allocation of shared memory, and the module on which to run them."""
    context, metadata = library.ir.context(), dict(vars(options))
    passes, target, manager = library.passes, backend.target, library.ir.pass_manager(context)
    if target.backend == "cuda":
        compiler = importlib.import_module(type(backend).__module__)
        version = compiler.get_ptx_version_from_options(options, target.arch)
        passes.ttgpuir.add_combine_tensor_select_and_if(manager)
        passes.convert.add_scf_to_cf(manager)
        library.nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, target.arch, version)
    else:
        passes.convert.add_scf_to_cf(manager)
        passes.convert.add_index_to_llvmir(manager)
        allocate = library.amd.passes.ttgpuir.add_allocate_shared_memory
        allocate(manager, *[target.arch] * ("str" in str(allocate.__doc__)))  # from Triton 3.8 on
    library.ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Callable[[Any, Any], Any]] = {}
    backend.add_stages(stages, options, source.language)
    generated = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, *generated, context)
    for name in [name for name in ("ttir", "ttgir") if name in stages]:  # Gluon begins with the second
        module = stages[name](module, metadata)
    return manager, module


# -- what is loaded, and what happens ---------------------------------------------------------------------------------


class Variant(NamedTuple):
    """A variant of a kernel that was asked for: what Triton compiles for of every argument, and of other options."""

    key: str
    arguments: tuple[tuple[str, Any], ...]
    options: str
    loaded: bool


def variants(function: Any) -> list[Variant]:
    """Return the variants of a kernel that were asked for in this process, of all devices."""
    try:
        return [
            Variant(key, tuple(arguments), options, key in loaded)
            for loaded, keys, *_ in function.device_caches.values()
            for (arguments, options), key in keys.items()
        ]
    except (AttributeError, TypeError, ValueError):
        _warn_once("device_caches", "the variants of a kernel that are loaded are not known")
        return []


_unloading: list[None] = []
"""One for each block of `unloaded`."""


@contextmanager
def unloaded(functions: Iterable[Any]) -> Iterator[None]:
    """Within the block, kernels are as if none of their variants were loaded."""
    before = []
    _unloading.append(None)
    for function in functions:
        try:
            before.append((function, function.device_caches))
            function.device_caches = type(function.device_caches)(function.device_caches.default_factory)
        except (AttributeError, TypeError):
            _warn_once("device_caches", "variants of a kernel that are loaded are not counted")
    try:
        yield
    finally:
        _unloading.pop()
        for function, caches in reversed(before):
            function.device_caches = caches


def call_before(path: str, hook: Callable[..., None], consequence: str) -> None:
    """Call `hook` with the arguments of a method of Triton's, before each call of it."""
    if (method := _find(path, consequence)) is _GONE:
        return

    def hooked(*args: Any, **kwargs: Any) -> Any:
        hook(*args, **kwargs)
        return method(*args, **kwargs)

    owner, _, last = path.rpartition(".")
    setattr(named(*owner.split(":")), last, hooked)


def failures() -> tuple[type[Exception], ...]:
    """Return the errors with which Triton says that it cannot compile a kernel, or a device not run it."""
    consequence = "a kernel that fails at its launch is not told from other errors"
    found = [_find(path, consequence) for path in FAILURES]
    return tuple(error for error in found if error is not _GONE)


_run: list[Any] = []
"""Triton's own method that compiles and launches, while another one stands for it."""


def can_replace_run() -> bool:
    """Whether Triton's method that compiles and launches is known."""
    return _find(RUN, "a kernel that a device cannot run fails when it is launched") is not _GONE


def replace_run(substitute: Callable[..., Any] | None) -> None:
    """Let `substitute` stand for Triton's method that compiles and launches, which it gets as its first argument; with
    None, no longer.
    """
    owner, _, last = RUN.rpartition(".")
    if substitute is None:
        setattr(named(*owner.split(":")), last, _run.pop())
        return
    _run.append(run := named(*RUN.split(":")))

    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return substitute(run, self, *args, **kwargs)

    setattr(named(*owner.split(":")), last, replaced)


class Launching(NamedTuple):
    """What a launch without Triton's front needs."""

    front: Any
    """The class whose `run` is the front that it goes past."""
    run: Any
    """That method, as Triton has it."""
    runtime: Any
    """What has the hooks that are called around a launch."""
    device: Callable[[], int]
    """Returns the current device's number."""
    stream: Callable[[int], Any]
    """Returns the current stream of a device."""

    def is_watched(self) -> bool:
        """Whether something is called in or around a launch that the launch itself does not know."""
        enter, leave = self.runtime.launch_enter_hook, self.runtime.launch_exit_hook
        hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
        return bool(hooked or _unloading) or self.front.run is not self.run


@cache
def launching() -> Launching | None:
    """Return what a launch without Triton's front needs, or None where this Triton does not have it."""
    consequence = "every launch goes through Triton's front, which takes the host tens of microseconds"
    found = [_find(path, consequence) for path in (RUN, DRIVER, KERNEL, *LAUNCH_HOOKS)]
    if _GONE in found:
        return None
    run, driver, *_ = found
    run = _run[0] if _run else run  # a rehearsal of another thread stands for it for a while
    if run.__module__ != RUN.partition(":")[0] or hasattr(run, "__wrapped__"):  # something stands for it already
        return None
    front, runtime = named(*RUN.removesuffix(".run").split(":")), named("triton", "knobs.runtime")
    return Launching(front, run, runtime, driver.get_current_device, driver.get_current_stream)


def has_hooks() -> bool:
    """Whether Triton says when it loads a kernel, and lets other processes compile it: what a warm-up needs."""
    consequence = "a warm-up compiles one kernel after the other, and does not say which"
    return _GONE not in [_find(path, consequence) for path in (BEFORE_LOAD, LOADED, DRIVER, PRELOAD, TARGET)]


@contextmanager
def hook(path: str, function: Callable[..., Any], consequence: str) -> Iterator[None]:
    """Within the block, Triton calls `function` as its hook of this name, before one that is there already."""
    if (before := _find(path, consequence)) is _GONE:
        yield
        return
    owner, _, last = path.rpartition(".")
    owner = named(*owner.split(":"))

    def both(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) or (before(*args, **kwargs) if before else None)

    setattr(owner, last, both)
    try:
        yield
    finally:
        setattr(owner, last, before)


@cache
def mend_interpreter() -> None:
    """Let a flag that the interpreter spreads over a block stay a flag.

    That of Triton 3.9 makes numbers of a comparison's result, and then takes no mask that is made of a block and that.
    """
    if (spread := _find(SPLAT, "its interpreter may refuse masks")) is _GONE:
        return

    def create_splat(self: Any, block_type: Any, value: Any) -> Any:
        block = spread(self, block_type, value)
        block.data = block.data.astype(value.data.dtype, copy=False)
        return block

    owner, _, last = SPLAT.rpartition(".")
    setattr(named(*owner.split(":")), last, create_splat)
