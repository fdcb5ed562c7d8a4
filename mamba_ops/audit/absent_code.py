"""A user's own script on a device that is not present: its tensors are fake, and its compiles are traced alone."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mamba_ops.audit import _torch, absent
from mamba_ops.audit.answers import let_devices_be_entered, present


@contextlib.contextmanager
def traced_as_if_present(device: str, on_assumption: Callable[[str], None] | None = None) -> Iterator[None]:
    """Within the block, code that makes tensors on an absent device and compiles functions of them is traced.

    The code is told that the device is there. Tensors have no values, nothing records gradients, and Inductor does not
    run. Values that Python asks for outside of graphs are 1.

    Args:
        device: "cuda" or "xpu".
        on_assumption: called with an op whose values were taken to be 1. None: what needs a value raises.
    """
    kind = torch.device(device)
    absent.install(kind.type)
    compile_as_asked = torch.compile

    @functools.wraps(compile_as_asked)
    def trace(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return lambda decorated: trace(decorated, **options)
        kept = {name: value for name, value in options.items() if name in ("fullgraph", "dynamic", "disable")}
        return compile_as_asked(model, backend=_lower, **kept)

    with contextlib.ExitStack() as stack:
        _torch.let_triton_be_found(stack)
        let_devices_be_entered(stack, kind)
        stack.enter_context(present(kind))
        _torch.replace(stack, "torch.nn:Module._apply", _apply)
        stack.enter_context(mock.patch.object(torch, "compile", trace))
        stack.enter_context(_torch.patched("torch.fx.experimental.proxy_tensor:CONSTANT_NUMEL_LIMIT", -1))
        stack.enter_context(torch.no_grad())
        stack.enter_context(absent.fake_mode())
        stack.enter_context(absent.assuming(on_assumption))
        yield


def _apply(original: Any, module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Move a module by giving it new tensors; torch exchanges the old ones in place, which fake ones do not allow."""
    for child in module.children() if recurse else ():
        _apply(original, child, fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(fn(parameter), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def _lower(module: torch.fx.GraphModule, inputs: Any) -> Any:
    return _torch.lower(module, inputs, lambda lowered: None)
