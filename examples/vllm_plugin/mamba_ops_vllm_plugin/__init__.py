"""Runs the Mamba-family layers of vLLM on mamba-ops. vLLM finds `register` through an entry point.

Nothing of vLLM is imported but what `register` and `splitting_ops` name, when they are called.
"""

import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("vllm.mamba_ops_vllm_plugin")  # below vLLM's own, so that its log has it

FUNCTIONS = {
    "vllm.model_executor.layers.mamba.ops.mamba_ssm": ("selective_state_update", "selective_scan_fn"),
    "vllm.model_executor.layers.mamba.ops.causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
    "vllm.model_executor.layers.mamba.ops.ssd_combined": ("mamba_chunk_scan_combined_varlen",),
}
"""Which functions of vLLM 0.33 are replaced, by their module."""


def register() -> None:
    """Put our functions in the place of vLLM's. It may be called again, in every process."""
    from mamba_ops.compat import vllm as ours  # defines the ops by layer name, too

    for name, functions in FUNCTIONS.items():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            logger.warning("%s is not replaced: %s", name, error)
            continue
        for function in functions:
            _replace(module, function, getattr(ours, function))


def splitting_ops() -> list[str]:
    """Return vLLM's own splitting ops, then ours: vLLM takes a list that lacks one of its own for not piecewise."""
    from vllm.config import CompilationConfig

    from mamba_ops.registry import splitting_ops as ours

    theirs = list(CompilationConfig._attention_ops)
    return theirs + [name for name in ours() if name not in theirs]


def _replace(module: Any, name: str, new: Callable[..., Any]) -> None:
    """Replace a function wherever vLLM has it, unless its arguments are not those that ours has."""
    old = getattr(module, name, None)
    if old is new:
        return
    if old is None or _names(old) != _names(new):
        got = "it is not there" if old is None else f"it takes {', '.join(_names(old))}"
        logger.warning(
            "%s.%s is not replaced: %s, and ours takes %s", module.__name__, name, got, ", ".join(_names(new))
        )
        return
    # Python keeps None for a module that is not to be imported.
    for other in [m for n, m in list(sys.modules.items()) if n.partition(".")[0] == "vllm" and m is not None]:
        for attribute, value in list(vars(other).items()):
            if value is old:
                setattr(other, attribute, new)
    logger.info("%s.%s runs on mamba-ops", module.__name__, name)


def _names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)
