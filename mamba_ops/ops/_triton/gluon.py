"""Where kernels run that are written in Gluon, Triton's language for what one family of GPUs has."""

import functools
import importlib

import torch

from mamba_ops.ops._triton.launch_config import family


def runs_on_hopper(device: int, module: str) -> bool:
    """Return whether a device is a Hopper GPU, and this Triton has what a module of kernels for it imports."""
    return family(device) == "cuda-90" and _imports(module)


@functools.cache
def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except (ImportError, AttributeError):  # a Triton without Gluon, or with an earlier one
        return False
    return True


@functools.cache
def multiprocessors(device: int) -> int:
    """Return how many multiprocessors an accelerator has, 0 for one that is not here (-1) or does not say it."""
    if device < 0 or (accelerator := torch.accelerator.current_accelerator()) is None:
        return 0
    properties = torch.get_device_module(accelerator).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0))
