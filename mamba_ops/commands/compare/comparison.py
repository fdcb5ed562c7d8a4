"""Compares backends on one model: times, differences of the outputs, refusals and recompiles."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ops.audit import _torch
from mamba_ops.commands.targets import Target, TargetError, as_target, load_target
from mamba_ops.commands.watch import device_name, watch_compiler
from mamba_ops.registry import NoBackendError, backends, record_selections, use_backend
from mamba_ops.registry.snapshot import COMPOSED

ROUNDS = 3  # of each timed pass over all calls; the best counts
TOLERANCE = 1e-2  # of the largest output: backends round at different places, and bfloat16 has 8 bits


@dataclass(frozen=True)
class Row:
    """One backend.

    Attributes:
        backend: the name asked for; ops for which it has no kernel run in the default order.
        refusal: why it does not take a call; then the other attributes keep their defaults.
        eager_ms, compiled_ms: all calls, one after the other.
        difference: of an output, eager or compiled, from the eager one of the first backend that ran; at most.
        recompiles: how often something was compiled again while this backend ran.
        kernel_calls: how many runs of an op each backend took, in one eager pass.
    """

    backend: str
    refusal: str | None = None
    eager_ms: float = 0.0
    compiled_ms: float = 0.0
    difference: float = 0.0
    recompiles: int = 0
    kernel_calls: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All backends.

    Attributes:
        rows: one a backend.
        device: the name of the device.
        calls: how many calls of the model were compared.
        graphs: how many graphs all of it took.
        largest: the largest output.
    """

    rows: tuple[Row, ...]
    device: str
    calls: int
    graphs: int
    largest: float

    @property
    def problems(self) -> list[str]:
        """A sentence for each result that is not as expected."""
        tolerance = TOLERANCE * self.largest
        ran = [row for row in self.rows if row.refusal is None]
        if not ran:
            return ["no backend takes this model's calls"]
        found = [
            f"{row.backend}: an output is {row.difference:.2g} off, expected at most {tolerance:.2g}"
            for row in ran
            if not row.difference <= tolerance  # NaN is wrong too
        ]
        if not any(row.kernel_calls for row in ran):
            found.append("the model calls no op of mamba_ops, expected one at least")
        found += [
            f"{row.backend}: {row.recompiles} recompiles after the first backend's, expected none"
            for row in ran[1:]
            if row.recompiles
        ]
        return found


def compare(
    target: "str | tuple[nn.Module, Any]",
    backends: Sequence[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    layers: int | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Run a model on one backend after the other, eagerly and compiled once for all of them.

    It resets torch.compile. During the comparison, a Mamba-2 model of Transformers runs on our ops.

    Args:
        target: what `mamba-ops compare` takes, or a model and its inputs: a tensor, a tuple, a dict, or a list of
            these. The model goes to eval mode and to the device; buffers that calls change are put back.
        backends: names; the first is compared with. None: all that can run on the device.
        device: the device to run on.
        layers: of a model of Transformers with random weights.
        progress: called with each step that begins.

    Raises:
        TargetError: there is no such model, or it failed by itself.
        UnknownNameError: there is no such backend.
    """
    device = torch.device(device)
    progress("loading the model")
    if isinstance(target, str):
        found = load_target(target, device, layers=layers)
    else:
        found = as_target(target, "the target", device)
    names = _usable(device) if backends is None else [name.lower() for name in backends]
    for name in names:
        with use_backend(name):  # raises for an unknown name, before anything runs
            pass
    torch.compiler.reset()
    compiled = torch.compile(found.model, dynamic=True)
    rows: list[Row] = []
    expected: list[list[Tensor]] = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        _bind(found.model, stack)
        watch = stack.enter_context(watch_compiler())
        for name in names:
            before = watch.recompiles
            try:
                with use_backend(name):
                    progress(f"{name}, eager")
                    with record_selections() as record:
                        eager = _outputs(found, found.model)
                    eager_ms = _best_ms(found, found.model, device)
                    progress(f"{name}, compiled")
                    got = _outputs(found, compiled)
                    compiled_ms = _best_ms(found, compiled, device)
            except NoBackendError as error:
                rows.append(Row(name, refusal=_sentence(error)))
                continue
            except Exception as error:
                raise TargetError(f"the model raised {type(error).__name__} on {name}") from error
            expected = expected or eager
            difference = max(_difference(eager, expected), _difference(got, expected))
            calls = Counter(selection.backend for selection in record)
            rows.append(Row(name, None, eager_ms, compiled_ms, difference, watch.recompiles - before, calls))
        graphs = watch.graphs
    largest = max((float(t.abs().max()) for out in expected for t in out if t.numel()), default=0.0)
    return Comparison(tuple(rows), device_name(device), len(found.calls), graphs, largest)


def _usable(device: torch.device) -> list[str]:
    """Return what can be compared: not "composed", which leaves the choice to the ops inside."""
    usable = [backend.name for backend in backends() if backend.why_unusable(device.type) is None]
    return [name for name in usable if name != COMPOSED]


def _bind(model: nn.Module, stack: ExitStack) -> None:
    """Let a model of Transformers run on our ops; other models call them directly."""
    if any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        from mamba_ops.compat.transformers import use_mamba_ops

        with suppress(ValueError):  # a model without such mixers may call our ops directly
            stack.enter_context(use_mamba_ops(model))


def _outputs(target: Target, model: Callable[..., Any]) -> list[list[Tensor]]:
    """Return the tensors that each call returns, and leave the model's buffers as they were."""
    buffers = {name: buffer.clone() for name, buffer in target.model.named_buffers()}
    results = []
    for call in target.calls:
        results.append([tensor.double() for tensor in _torch.tensors_in(call.on(model))])
    for name, buffer in target.model.named_buffers():
        buffer.copy_(buffers[name])
    return results


def _best_ms(target: Target, model: Callable[..., Any], device: torch.device) -> float:
    times = []
    synchronize = torch.get_device_module(device).synchronize
    for _ in range(ROUNDS):
        synchronize()
        start = time.perf_counter()
        _outputs(target, model)
        synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def _difference(got: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    pairs = [(g, e) for gs, es in zip(got, expected, strict=True) for g, e in zip(gs, es, strict=True)]
    return max((float((g - e).abs().max()) for g, e in pairs if g.numel()), default=0.0)


def _sentence(error: NoBackendError) -> str:
    return "; ".join(error.reasons.values())
