"""Runs recurrent models of Transformers 5 on our ops, by binding the functions that their modeling files call.

Such a file has a few functions of its own for this. Transformers decides where each goes: to a kernel from the hub if
one was asked for, else to mamba_ssm, causal_conv1d or fla if they are installed, else to torch code. In each case a
mixer looks the function up by its name in the file, at every call; `use_mamba_ops` puts functions of this package
there.

They have the parameters of the originals. Mixers pass them all keyword arguments that the model was called with; as
Transformers does, those that a function does not name are dropped. Where packed documents begin, and which state was
before, is known from the mixer's own call (transformers_mixing.py), whichever of it the mixer hands down.
"""

import functools
import inspect
import math
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mamba_ops.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ops.compat.fla import delta_rule, kda
from mamba_ops.compat.mamba_ssm import mamba_chunk_scan_combined, selective_scan_fn, selective_state_update
from mamba_ops.compat.packing import Packed
from mamba_ops.compat.transformers_mixing import MASKS, current_mixing, hearing, noting, refusing, telling
from mamba_ops.compat.transformers_norms import bind_norms, unbind_norms
from mamba_ops.compat.transformers_structure import call_instead, mixers_of, models_of, others_of, put_back
from mamba_ops.ops.causal_conv1d_update.op import WIDEST


@dataclass(eq=False)
class Binding:
    """The functions that `use_mamba_ops` replaced; `undo`, or the end of a `with` block, puts the originals back.

    Attributes:
        bound: the functions that were replaced, as `file.function`.
        not_bound: those that were not, and classes that compute something by code of their own, each with the reason.
        norms: the classes of RMS norms that are one call of `rms_norm` in eager inference on a device that has a kernel
            of it, as `file.class`, and how many of the model's modules are.
    """

    bound: list[str] = field(default_factory=list)
    not_bound: dict[str, str] = field(default_factory=dict)
    norms: dict[str, int] = field(default_factory=dict)
    _files: list[str] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the originals back in each file that no other binding holds. A second call has no effect."""
        with _lock:
            unbind_norms(self)
            while self._files:
                file = self._files.pop()
                held = _bindings[file]
                held.bindings.remove(self)
                if not held.bindings:
                    held.put_back(vars(sys.modules[file]))
                    del _bindings[file]

    def __enter__(self) -> "Binding":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{name} runs on mamba_ops" for name in self.bound]
        norm = "one call of rms_norm in eager inference, where that has a kernel"
        lines += [f"{name} is {norm}: {count} in the model" for name, count in self.norms.items()]
        return "\n".join(lines + [f"{name} stays as it was: {why}" for name, why in self.not_bound.items()])


@dataclass
class _Held:
    """What was replaced in a modeling file, and the bindings that hold it so."""

    functions: dict[str, Any]
    forwards: dict[type[nn.Module], Any] = field(default_factory=dict)
    modules: list[weakref.ref[nn.Module]] = field(default_factory=list)  # those with a forward of their own
    bindings: list[Binding] = field(default_factory=list)

    def replace(self, kind: type[nn.Module], wrap: Callable[..., Any], model: nn.Module) -> None:
        if kind not in self.forwards:
            self.forwards[kind] = kind.forward
            kind.forward = wrap(kind.forward)
        self.modules += [weakref.ref(m) for m in model.modules() if isinstance(m, kind) and call_instead(m, wrap)]

    def put_back(self, names: dict[str, Any]) -> None:
        names.update(self.functions)
        for kind, forward in self.forwards.items():
            kind.forward = forward
        for module in self.modules:
            put_back(module())


_CACHES = ("cache", "cache_params", "past_key_values")  # what a cache is called, the newest name first
_bindings: dict[str, _Held] = {}  # by file
_lock = threading.RLock()


def use_mamba_ops(model: nn.Module) -> Binding:
    """Let the recurrent mixers of a Transformers model run on our ops, until `undo()` of what is returned.

    Those are the Mamba, Mamba-2, gated-delta-net and KDA mixers of Mamba, Falcon-Mamba, Jamba, Zamba, Mamba-2, its
    hybrids, Qwen3-Next, Qwen3.5, OLMo-hybrid, Kimi-Linear, Bailing-hybrid, GLM-5-next, and of each modeling file that
    calls the functions of a family by its names; of LFM2 and others the short convolutions. Parameters, cache and
    `generate()` do not change. As the functions belong to the modeling file, all models that share it change together.

    RMS norms of the model, gated ones too, are one call of `rms_norm` where it has a kernel, nothing is compiled, and
    nothing records gradients; elsewhere, as on a CPU, they are the model's own. They are found by what they compute.

    The model trains as it did: in `train()` too its mixers call their projections and norms as modules, and honour the
    attention mask. Steps that decode one token record no gradients. Packed documents are kept apart if the model is
    called with `cu_seq_lens_q`; with `seq_idx`, or `position_ids` that begin anew and neither mask nor cache, where an
    eager call waits for the device once. In a call without a cache the masks of its attention know of them too. A part
    that cannot keep them apart refuses them; what is returned names it. Mamba-1 mixers that read several tokens on top
    of a cache go on from its state, where Transformers' own begin anew.

    Modules whose `forward` is their own, as hooks of accelerate make it, are told of documents if they are in `model`.

    Args:
        model: a model with such mixers, or any module that holds one.

    Raises:
        ValueError: there are no such mixers in it, or one convolves with a width that no op has.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"use_mamba_ops: model: got a {type(model).__name__}, expected a module")
    files = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
    wanted = {file: _functions_of(vars(sys.modules[file])) for file in files if file in sys.modules}
    wanted = {file: functions for file, functions in sorted(wanted.items()) if functions}
    if not wanted:
        expected = "a model of Transformers 5 with Mamba, Mamba-2, gated-delta-net or KDA mixers"
        raise ValueError(f"use_mamba_ops: model: got {type(model).__name__}, expected {expected}")
    mixers = {file: mixers_of(vars(sys.modules[file]), file, functions) for file, functions in wanted.items()}
    _check_convolutions(model, tuple(kind for kinds in mixers.values() for kind in kinds))
    binding = Binding()
    with _lock:
        try:
            for file, functions in wanted.items():
                _bind(binding, model, file, functions, mixers[file])
            binding.norms, others = bind_norms(model, binding)
        except BaseException:
            binding.undo()
            raise
        binding.not_bound |= others
    return binding


def _bind(
    binding: Binding,
    model: nn.Module,
    file: str,
    functions: Mapping[str, Callable[..., Any]],
    mixers: list[type[nn.Module]],
) -> None:
    names = vars(sys.modules[file])
    masks = {name: hearing(names[name]) for name in MASKS if name in names}
    new = {name: function for name, function in functions.items() if name in names} | masks
    held = _bindings.setdefault(file, _Held({name: names[name] for name in new}))
    held.bindings.append(binding)
    binding._files.append(file)
    binding.bound += [f"{file}.{name}" for name in new if name not in masks]
    binding.not_bound |= {f"{file}.{name}": "there is none" for name in functions if name not in names}
    for kind in mixers:
        held.replace(kind, noting, model)
    for kind in others_of(model, file, mixers):
        held.replace(kind, refusing, model)
        binding.not_bound[f"{file}.{kind.__name__}"] = "it keeps states by its own code, and refuses packed documents"
    for kind, is_innermost in models_of(model, file, mixers).items():
        is_deaf = is_innermost and not masks and _has_attention(model, kind)
        wrap = functools.partial(telling, is_innermost=is_innermost, has_deaf_attention=is_deaf)
        held.replace(kind, wrap, model)
        if is_deaf:
            why = "its attention makes no mask by positions, and packed documents are refused"
            binding.not_bound[f"{file}.{kind.__name__}"] = why
    if len(held.bindings) == 1:
        names.update(new)


def _check_convolutions(model: nn.Module, mixers: tuple[type[nn.Module], ...]) -> None:
    """Raise about a mixer whose convolution no op reads."""
    for mixer in model.modules():
        for part in mixer.children() if isinstance(mixer, mixers) else ():
            if isinstance(part, nn.Conv1d) and not 2 <= (width := part.kernel_size[0]) <= WIDEST:
                got, expected = f"{type(mixer).__name__} with a convolution of width {width}", f"2 to {WIDEST}"
                raise ValueError(f"use_mamba_ops: model: got a {got}, expected a width of {expected}")


def _has_attention(model: nn.Module, kind: type[nn.Module]) -> bool:
    configs = (getattr(m, "config", None) for m in model.modules() if isinstance(m, kind))
    return any(hasattr(config, "num_attention_heads") for config in configs)


def cache_keyword(module: nn.Module) -> str:
    """Return what a mixer calls its cache: from Transformers 5.24 on `cache`; before, two names by family."""
    known = inspect.signature(module.forward).parameters
    return next((name for name in _CACHES if name in known), "cache_params")


def cache_of(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cache in what a model returned, as the keyword of its next call."""
    fields = set(output.keys())  # and not what it takes for one under an older name
    return {name: output[name] for name in _CACHES if name in fields}


def is_bound(module: nn.Module) -> bool:
    """Return whether the modeling file of a module calls our functions now."""
    return any(kind.__module__ in _bindings for kind in type(module).__mro__)


def _functions_of(names: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Return the functions for a modeling file with these names: those of every family that it calls."""
    functions: dict[str, Callable[..., Any]] = {}
    for marks, family in _FAMILIES.items():
        if all(callable(names.get(mark)) for mark in marks):
            functions |= _CONVOLUTIONS | family
    return functions


def _for_mixers(function: Callable[..., Any], axis: int = 1) -> Callable[..., Any]:
    """Let a function take all that mixers pass: it gets what it names, and the documents of the mixer's call.

    Args:
        function: of `compat`.
        axis: that of its first argument which has a row's tokens.
    """
    kinds = inspect.signature(function).parameters.values()
    names = frozenset(p.name for p in kinds if p.kind is not p.VAR_KEYWORD)
    packs = {"cu_seqlens", "seq_idx"} <= names

    @functools.wraps(function)
    def call(*args: Any, cu_seq_lens_q: Tensor | None = None, **others: Any) -> Any:
        known = {name: value for name, value in others.items() if name in names}
        mixing = current_mixing()
        if not packs:
            return function(*args, **known)
        if mixing is not None:
            known |= mixing.packing(args[0].shape[axis])
        elif known.get("cu_seqlens") is None:
            known["cu_seqlens"] = cu_seq_lens_q
        return function(*args, **known)

    return call


def _with_any_activation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a convolution take the activations of Transformers too, which then come after it."""

    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: Any, **others: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | others
        if (activation := given.pop("activation", None)) in (None, "silu", "swish"):
            return function(*args, **others)
        from transformers.activations import ACT2FN

        first, *_ = names
        return ACT2FN[activation](function(given.pop(first), **given))

    return call


@functools.wraps(selective_scan_fn)
def _selective_scan(*args: Any, **others: Any) -> Any:
    """Scan on from the state before, which Mamba-1 mixers do not hand down."""
    mixing = current_mixing()
    state = None if mixing is None else mixing.next_state()
    return _scan(*args, **others) if state is None else _scan(*args, **others, initial_states=state.float())


_scan = _for_mixers(selective_scan_fn, axis=2)


def _of_rows(function: Callable[..., delta_rule.OutputAndState]) -> Callable[..., delta_rule.OutputAndState]:
    """Let a function of fla that reads sequences take rows of packed documents."""
    read = _v_first(function)

    @_for_mixers
    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> delta_rule.OutputAndState:
        """Read rows; the last states are those of the rows, as a cache keeps them."""
        packed = Packed(function.__name__, q.shape[:2], seq_idx, cu_seqlens)
        tensors: dict[str, Any] = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
        if packed.first is not None:
            tensors["g"] = g.masked_fill(packed.first.view(*g.shape[:2], *[1] * (g.dim() - 2)), -math.inf)
        elif packed.cu_seqlens is not None:
            tensors = {name: packed.flat(tensor).unsqueeze(0) for name, tensor in tensors.items()}
        out, states = read(
            **tensors,
            initial_state=packed.initial("initial_state", initial_state),
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=packed.cu_seqlens,
        )
        out = out if packed.cu_seqlens is None else packed.rows(out.squeeze(0))
        return out, None if states is None else packed.last(states)

    return call


def _v_first(function: Callable[..., delta_rule.OutputAndState]) -> Callable[..., delta_rule.OutputAndState]:
    """Let a function of fla give states as views of what the op leaves, which has v_dim first.

    A cache of Transformers keeps their strides, so that a step neither turns its states nor turns them back.
    """

    @functools.wraps(function)
    def call(*args: Any, initial_state: Tensor | None = None, **others: Any) -> delta_rule.OutputAndState:
        turned = None if initial_state is None else initial_state.transpose(-1, -2)
        out, states = function(*args, initial_state=turned, state_v_first=True, **others)
        return out, None if states is None else states.transpose(-1, -2)

    return call


def _no_fused_mixer(*args: object, **kwargs: object) -> None:
    """Return None, as Transformers' own function does without mamba_ssm: there is no kernel for a whole mixer.

    The mixer then calls its parts. A fused one would take raw weights, past what wraps a projection, and knows no
    attention mask; mamba_ssm's for Mamba-1 also normalises step sizes at another place than the parts do.
    """


_CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _with_any_activation(_for_mixers(causal_conv1d_fn, axis=2)),
    "causal_conv1d_update": _with_any_activation(_for_mixers(causal_conv1d_update)),
}
_FAMILIES: dict[tuple[str, ...], dict[str, Callable[..., Any]]] = {  # by functions that mark one: names in such files
    ("apply_mask_to_padding_states", "causal_conv1d_fn"): {},
    ("mamba_selective_scan",): {
        "mamba_inner_fn": _no_fused_mixer,
        "mamba_selective_scan": _selective_scan,
        "mamba_selective_state_update": _for_mixers(selective_state_update),
    },
    ("mamba2_chunk_scan",): {
        "mamba2_chunk_scan": _for_mixers(mamba_chunk_scan_combined),
        "mamba2_selective_state_update": _for_mixers(selective_state_update),
        "mamba2_split_conv1d_scan_combined": _no_fused_mixer,
    },
    ("torch_chunk_gated_delta_rule",): {
        "torch_chunk_gated_delta_rule": _of_rows(delta_rule.chunk_gated_delta_rule),
        "torch_recurrent_gated_delta_rule": _for_mixers(_v_first(delta_rule.fused_recurrent_gated_delta_rule)),
    },
    ("chunk_kimi_delta_attention",): {
        "chunk_kimi_delta_attention": _of_rows(kda.chunk_kda),
        "recurrent_kimi_delta_attention": _for_mixers(_v_first(kda.fused_recurrent_kda)),
    },
}
