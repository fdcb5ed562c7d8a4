"""Which kernels fit a GPU that need not be here: what Triton asks of it, found out without a full compile.

Ops are called with a driver that stands for the GPU and a hook that ends each launch where its variant is known. Each
variant then goes through the part of Triton's compiler that allocates shared memory. That part refuses what the whole
compiler refuses, and counts the same bytes, in a tenth of the time.
"""

import functools
import inspect
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mamba_ops.cold_start.targets import Target
    from mamba_ops.registry import Op, Sample

DTYPES = ("bfloat16", "float16", "float32")
SIZES: Mapping[str, int] = {
    "heads": 4,
    "k_heads": 2,
    "v_heads": 4,
    "dim": 64,
    "dstate": 128,
    "k_dim": 128,
    "v_dim": 128,
    "chunk_size": 256,
}
"""Sizes of large models, by the names of the ops' samples; of heads a few: kernels do not depend on how many."""
OF_OP: Mapping[str, Mapping[str, int]] = {
    "rms_norm": {"dim": 16384},
    "selective_scan": {"dim": 1024, "dstate": 16},
}


class Fit(NamedTuple):
    """What one variant of a kernel asks of a GPU.

    Attributes:
        target, op, kernel, dtype: for what it was compiled; `kernel` is `op.function`.
        states: the dtype of the states that the op was called with.
        launch: what was chosen for it: blocks, warps, stages.
        shared: bytes of shared memory; -1 where it does not compile.
        limit: how many there are.
        problem: why it does not compile, or "".
    """

    target: str
    op: str
    kernel: str
    dtype: str
    states: str
    launch: str
    shared: int
    limit: int
    problem: str

    @property
    def fits(self) -> bool:
        """Whether the GPU can run it."""
        return not self.problem and self.shared <= self.limit

    def __str__(self) -> str:
        asks = self.problem or f"{self.shared:,} bytes of shared memory, of {self.limit:,}"
        what = f"{self.kernel} of {self.op}, {self.dtype}, states of {self.states}"
        return f"{what}, on {self.target} ({self.launch}): {asks}"


def fits(
    targets: "Iterable[str | Target]",
    *,
    ops: Sequence[str] = (),
    dtypes: Sequence[str] = DTYPES,
    sizes: Mapping[str, int] | None = None,
    samples: int | None = 1,
) -> Iterator[Fit]:
    """Compile the variants that calls of ops ask for, as far as shared memory is known, for GPUs by name.

    Yields each when it is done. It runs in a child process, which needs no GPU.

    Args:
        targets: names of `targets.TARGETS`, or any others.
        ops: names of ops; none: all that have Triton kernels, those that compute gradients included, and those that ask
            for other variants of these kernels.
        dtypes: of activations; states are float32, then each narrow dtype that the op takes.
        sizes: static sizes that replace those of `SIZES`.
        samples: how many samples of each op are called, from the first one on; None: all.

    Raises:
        ValueError: no op has a size of that name, or it is no positive number.
    """
    from mamba_ops import registry
    from mamba_ops.cold_start import arguments

    known = [op for op in registry.ops().values() if "samples" in op.facets and launches(op)]
    arguments.check_numbers(sizes or {}, None)
    arguments.check_names(sizes or {}, known)
    request = {"targets": list(targets), "ops": list(ops), "dtypes": list(dtypes), "sizes": sizes, "samples": samples}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109
    command = [sys.executable, "-m", __name__, json.dumps(request)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None  # for mypy: it is a pipe
        for line in child.stdout:
            yield Fit(*json.loads(line))
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)


def launches(op: "Op[...]") -> bool:
    """Return whether an op asks for variants of kernels that no other does.

    What mixes a batch does not, nor does what keeps a forward's results for gradients.
    """
    return "triton" in op.kernels


class Variant(NamedTuple):
    """What a call asks of Triton's compiler."""

    states: str
    module: str
    function: str
    key: str
    kernel: Any
    asked: Any
    """What Triton's hook is given of what it would compile."""

    @property
    def launch(self) -> str:
        """Its constexprs that a rule chooses, its warps and stages."""
        names, constants = self.kernel.arg_names, self.asked["constants"]
        chosen = {names[at]: value for (at, *_), value in constants.items()}
        shown = {n: v for n, v in chosen.items() if n.startswith("BLOCK") or n in ("PRECISION", "WIDTH", "PARTS")}
        shown |= {"warps": self.asked["num_warps"], "stages": self.asked["num_stages"]}
        return ", ".join(f"{name} {value}" for name, value in shown.items())


def main() -> None:
    """Do what `fits` asks, in a process of its own: print a line for each variant."""
    from mamba_ops.cold_start.specialization import kernel_name
    from mamba_ops.cold_start.targets import Target, target_of
    from mamba_ops.ops._triton import _triton

    request = json.loads(sys.argv[1])
    for given in request["targets"]:
        target = target_of(given) if isinstance(given, str) else Target(*given)
        known: dict[tuple[str, ...], tuple[int, str]] = {}
        for dtype in request["dtypes"]:
            for op, asked in variants(target, request["ops"], dtype, request["sizes"] or {}, request["samples"]):
                for variant in asked:
                    identity = (variant.module, variant.function, variant.key)
                    if identity not in known:
                        shared, problem = -1, ""
                        try:
                            shared = _triton.shared_memory(variant.kernel, variant.asked)
                        except Exception as error:  # whatever Triton's compiler raises
                            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
                        known[identity] = shared, problem
                    shared, problem = known[identity]
                    kernel = kernel_name(variant.module, variant.function)
                    what = (target.name, op, kernel, dtype, variant.states, variant.launch)
                    print(json.dumps((*what, shared, target.shared_memory, problem)), flush=True)  # noqa: T201


def variants(
    target: "Target", names: Sequence[str], dtype: str, sizes: Mapping[str, int], samples: int | None
) -> Iterator[tuple[str, list[Variant]]]:
    """Call ops as on a GPU; yield the name of each, and the variants that it asks for."""
    import torch
    import triton

    from mamba_ops import backends
    from mamba_ops.cold_start.specialization import our_modules
    from mamba_ops.cold_start.targets import StandIn
    from mamba_ops.ops._triton import _triton, launch_config
    from mamba_ops.registry import use_backend

    modules = our_modules()
    kernels = [f for m in modules for f in vars(m).values() if isinstance(f, triton.JITFunction)]
    triton.runtime.driver.set_active(StandIn(target))
    backends.triton.devices = ("cpu",)
    launch_config.forget_device()
    asked: dict[tuple[str, str, str], Variant] = {}
    states = ""

    def note(*_: object, key: str, fn: Any, compile: Any, **__: object) -> bool:
        new = Variant(states, fn.module, fn.name, key, fn.jit_function, compile)
        asked.setdefault((fn.module, fn.name, key), new)
        return True

    noting = _triton.hook(_triton.BEFORE_LOAD, note, "which variants calls ask for is not known")
    with noting, _triton.unloaded(kernels), use_backend("triton"), torch.no_grad():
        for op, found in calls(names, dtype, sizes, samples):
            asked.clear()  # of what the sample of a backward op was made with
            for states, call in found:  # noqa: B007  # `note` reads it
                call()
            yield op, list(asked.values())


def calls(
    names: Sequence[str], dtype: str, sizes: Mapping[str, int], samples: int | None
) -> Iterator[tuple[str, list[tuple[str, Callable[[], object]]]]]:
    """Yield the name of each op, and calls of it, each with the dtype of its states: see `fits`."""
    import torch

    from mamba_ops.cold_start.layers import with_many_rows
    from mamba_ops.registry import ops

    for name, op in ops().items():
        if not launches(op) or (names and name not in names):
            continue
        # the backward's sampler takes its sizes
        base = next((other for other in ops().values() if other.backward_op is op), op)
        known = inspect.signature(base.sampler).parameters
        wanted = {"dtype": getattr(torch, dtype), "state_dtype": torch.float32, **SIZES}
        wanted |= {**OF_OP.get(base.name, {}), **sizes}
        wanted = {n: size for n, size in wanted.items() if n in known}
        made = iter(op.sampler(torch.device("cpu"), **wanted))
        chosen = list(itertools.islice(made, samples))
        if op.kernels["triton"].partial:  # a call that it leaves to the ops inside, too
            chosen += itertools.islice((each for each in made if _goes_inside(op, each)), 1)
        found: list[tuple[str, Callable[[], object]]]
        found = [("float32", functools.partial(op, *each.args, **each.kwargs)) for each in chosen]
        if op.by_rows:
            found += [(states, with_many_rows(call)) for states, call in found]
        yield name, found + _narrow(op, chosen[0])


def _goes_inside(op: "Op[...]", sample: "Sample") -> bool:
    """Return whether an op's own Triton kernel leaves a call to the ops that it is composed of."""
    return op.kernels["triton"].why_not(op.bind(sample.args, sample.kwargs)) is not None


def _narrow(op: "Op[...]", sample: "Sample") -> list[tuple[str, Callable[[], object]]]:
    """Return a sample's calls with states in each narrow dtype, where the op takes them."""
    from mamba_ops.functional import narrow_states
    from mamba_ops.ops._common.checking import NARROW

    arguments = op.bind(sample.args, sample.kwargs)
    if "state_scale" not in arguments:
        return []
    arguments["out"] = arguments.pop("output")
    found: list[tuple[str, Callable[[], object]]] = []
    for dtype in NARROW:
        state, scale = narrow_states(arguments["ssm_state"], dtype)
        given = arguments | {"ssm_state": state, "state_scale": scale}
        found.append((str(dtype).removeprefix("torch."), functools.partial(op, **given)))
    return found


if __name__ == "__main__":
    main()
