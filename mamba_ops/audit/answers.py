"""What an absent device says of itself: code that asks `torch.cuda.is_available()` takes the branch of the device.

Torch, Triton and this package are told the truth: they would go on to the device itself.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from mamba_ops.audit import _torch
from mamba_ops.audit.report import Report

_TOLD_THE_TRUTH = (str(Path(torch.__file__).parent), str(Path(__file__).resolve().parents[1]))
_PROPERTIES = {
    "cuda": {"major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32, "total_memory": 80 * 2**30},
    "xpu": {"max_compute_units": 448, "gpu_eu_count": 448, "max_work_group_size": 1024, "total_memory": 48 * 2**30},
}
_ASSUMED = {"cuda": "one GPU of compute capability 9.0 with 80 GiB", "xpu": "one GPU with 48 GiB"}


def note_absence(report: Report, device: torch.device) -> None:
    """Add to a report what a trace for an absent device does not see, and what the code is told."""
    report.notes.append(
        f"{device} is not present: Dynamo and AOTAutograd ran, Inductor and kernels did not. Copies, CUDA graphs and "
        f"compiled Triton kernels need the device itself. "
        f"Code that asks for the device is told of {_ASSUMED[device.type]}."
    )
    if device.type == "xpu":
        report.notes.append(
            "Attention was traced through the math op: which fused kernel xpu takes, it decides itself."
        )


def _answers(kind: str) -> dict[str, Any]:
    properties = _PROPERTIES[kind]
    capability = (properties["major"], properties["minor"]) if kind == "cuda" else properties
    return {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": f"an absent {kind} device",
        "get_device_capability": capability,
        "get_device_properties": SimpleNamespace(name=f"an absent {kind} device", **properties),
        "is_bf16_supported": True,
    }


@contextlib.contextmanager
def present(device: torch.device) -> Iterator[None]:
    """Within the block, the user's code is told that an absent device is there.

    On the host, what it makes on the device or moves there is made on the CPU: see `on_host`.
    """
    accelerator = {"is_available": True, "device_count": 1, "current_accelerator": torch.device(device.type)}
    answers = [(torch.get_device_module(device), _answers(device.type)), (torch.accelerator, accelerator)]
    with contextlib.ExitStack() as stack:
        for module, of_module in answers:
            for name, answer in of_module.items():
                if (original := getattr(module, name, None)) is not None:
                    stack.enter_context(mock.patch.object(module, name, _answering(original, answer)))
        yield


def _answering(original: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    def answering(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # what Dynamo traces is the user's
            return answer
        asking = sys._getframe(1).f_code.co_filename
        if asking.startswith(_TOLD_THE_TRUTH) or "/triton/" in asking:
            return original(*args, **kwargs)
        return answer

    return answering


def let_devices_be_entered(stack: contextlib.ExitStack, device: torch.device) -> None:
    """Let `with torch.cuda.device(...)` be traced where torch was built without CUDA: no device is exchanged."""
    module = torch.get_device_module(device)
    for name in ("_exchange_device", "_maybe_exchange_device"):
        if hasattr(module, name):
            stack.enter_context(mock.patch.object(module, name, return_value=0))
    for cls in vars(_torch.find("torch._dynamo.variables:ctx_manager") or object).values():
        for name in ("_exchange_fn", "_maybe_exchange_fn"):  # Dynamo's classes keep the functions of their import
            if isinstance(cls, type) and callable(vars(cls).get(name)):
                stack.enter_context(mock.patch.object(cls, name, staticmethod(lambda index: 0)))


def on_host(device: torch.device) -> "TorchFunctionMode":
    """Within this, tensors for an absent device are made on the CPU: by `device=`, `.to()` and `.cuda()`."""
    return _OnHost(device.type)


class _OnHost(TorchFunctionMode):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == self.kind:  # x.cuda()
            return args[0]
        moved = {name: self._moved(value) for name, value in (kwargs or {}).items()}
        return func(*(self._moved(value) for value in args), **moved)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == self.kind:
            return torch.device("cpu")
        return value
