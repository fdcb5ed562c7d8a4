"""Runs recurrent models of Transformers 5 on our ops, by binding the functions that their modeling files call.

Such a file has a few functions of its own for this. Transformers decides where each goes: to a kernel from the hub if
one was asked for, else to mamba_ssm, causal_conv1d or fla if they are installed, else to torch code. In each case a
mixer looks the function up by its name in the file, at every call; `use_mamba_ops` puts functions of this package
there.

They have the parameters of the originals. Mixers pass them all keyword arguments that the model was called with, and
Transformers silently drops those that a function does not name. Here each one is honoured or refused, but for those
that concern the model alone.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mamba_ops.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ops.compat.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from mamba_ops.compat.mamba_ssm import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_scan_fn,
    selective_state_update,
)


@dataclass(eq=False)
class Binding:
    """The functions that `use_mamba_ops` replaced; `undo`, or the end of a `with` block, puts the originals back.

    Attributes:
        bound: the functions that were replaced, as `file.function`.
        not_bound: those that were not, each with the reason.
    """

    bound: list[str] = field(default_factory=list)
    not_bound: dict[str, str] = field(default_factory=dict)
    _files: list[str] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the originals back in each file that no other binding holds. A second call has no effect."""
        while self._files:
            file = self._files.pop()
            originals, bindings = _bindings[file]
            bindings.remove(self)
            if not bindings:
                vars(sys.modules[file]).update(originals)
                del _bindings[file]

    def __enter__(self) -> "Binding":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{name} runs on mamba_ops" for name in self.bound]
        return "\n".join(lines + [f"{name} stays as it was: {why}" for name, why in self.not_bound.items()])


_bindings: dict[str, tuple[dict[str, Any], list[Binding]]] = {}  # by file: the originals, and the bindings that hold it


def use_mamba_ops(model: nn.Module) -> Binding:
    """Let the recurrent mixers of a Transformers model run on our ops, until `undo()` of what is returned.

    Those are the Mamba, Mamba-2 and gated-delta-net mixers of Mamba, Falcon-Mamba, Jamba, Mamba-2, its hybrids,
    Qwen3-Next, Qwen3.5, OLMo-hybrid, and of each modeling file that calls the functions of a family by its names.
    Parameters, cache and `generate()` do not change. As the functions belong to the modeling file, all models that
    share it change together. The ops record no gradients: call the model under `no_grad`.

    Args:
        model: a model with such mixers, or any module that holds one.

    Raises:
        ValueError: there are no such mixers in it.
    """
    files = {type(module).__module__ for module in model.modules()}
    wanted = {file: _functions_of(vars(sys.modules[file])) for file in files if file in sys.modules}
    if not any(wanted.values()):
        expected = "a model of Transformers 5 with Mamba, Mamba-2 or gated-delta-net mixers"
        raise ValueError(f"use_mamba_ops: model: got {type(model).__name__}, expected {expected}")
    binding = Binding()
    for file, functions in sorted(wanted.items()):
        if not functions:
            continue
        names = vars(sys.modules[file])
        originals = {name: names[name] for name in functions if name in names}
        _bindings.setdefault(file, (originals, []))[1].append(binding)
        binding._files.append(file)
        binding.bound += [f"{file}.{name}" for name in originals]
        binding.not_bound |= {f"{file}.{name}": "there is none" for name in functions if name not in originals}
        names.update({name: functions[name] for name in originals})
    return binding


def cache_keyword(module: nn.Module) -> str:
    """Return what a mixer calls its cache: Transformers 5.24 renamed `cache_params` to `cache`."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "cache_params"


def cache_of(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cache in what a model returned, as the keyword of its next call."""
    fields = set(output.keys())  # and not what it takes for one under an older name
    return {name: output[name] for name in ("cache", "cache_params", "past_key_values") if name in fields}


def is_bound(module: nn.Module) -> bool:
    """Return whether the modeling file of a module calls our functions now."""
    return type(module).__module__ in _bindings


def _functions_of(names: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Return the functions for a modeling file with these names: those of every family that it calls."""
    functions: dict[str, Callable[..., Any]] = {}
    for mark, family in _FAMILIES.items():
        if callable(names.get(mark)):
            functions |= _CONVOLUTIONS | family
    return functions


def mamba_inner_fn(*args: object, **kwargs: object) -> None:
    """Return None, as Transformers' own function does without mamba_ssm: there is no kernel for a whole mixer.

    The mixer then calls its parts. mamba_ssm's kernel is not imitated: it normalises step sizes after their projection,
    where the mixer's parts, and so every other way to run the model, do so before.
    """


_CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
}
_FAMILIES: dict[str, dict[str, Callable[..., Any]]] = {  # by the function that marks a family: names in modeling files
    "mamba_selective_scan": {
        "mamba_inner_fn": mamba_inner_fn,
        "mamba_selective_scan": selective_scan_fn,
        "mamba_selective_state_update": selective_state_update,
    },
    "mamba2_chunk_scan": {
        "mamba2_chunk_scan": mamba_chunk_scan_combined,
        "mamba2_selective_state_update": selective_state_update,
        "mamba2_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
    },
    "torch_chunk_gated_delta_rule": {
        "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
        "torch_recurrent_gated_delta_rule": fused_recurrent_gated_delta_rule,
    },
}
