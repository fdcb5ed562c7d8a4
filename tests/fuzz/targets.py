"""What is called: every op on its backends, companions, layers, the functions of other libraries, plans and pools."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mamba_ops
from mamba_ops import registry
from mamba_ops.compat import causal_conv1d, fla, mamba_ssm, vllm
from mamba_ops.functional import narrow_states, widen_states
from mamba_ops.layers import (
    FalconH1Mamba2,
    GatedDeltaNet,
    KimiDeltaAttention,
    Mamba,
    Mamba2,
    Mamba3,
    OlmoGatedDeltaNet,
    ShortConv,
    ZambaMamba,
)
from mamba_ops.ops._common import narrow
from mamba_ops.registry import codegen
from mamba_ops.serving import Plan
from mamba_ops.testing.judge import numbers_meant
from tests.fuzz.mutations import Arguments, plain
from tests.harness import OPS, backends_here, expected, samples_for

CPU = torch.device("cpu")
INSIDE = ("mamba_chunk_scan_combined",)
"""What functions that call others name in messages, beside the ops."""

Results = dict[str, Tensor]
Judge = Callable[[Results, Results, Results, Results], None]


class Target(NamedTuple):
    """Something to call.

    Attributes:
        name: how messages call it.
        call: runs a call and returns its results.
        bases: right calls, each made anew.
        truth: what is right for arguments, computed in a dtype; it changes none of them.
        written: names of the arguments that a call may write.
        inside: of what calls ops: other functions that messages may name, beside the ops.
        has_oracle: whether `truth` is an oracle, which rounds where kernels do; else it is the same call in another
            dtype, which in 16 bits rounds between ops too.
        judge: compares the results, by name, with the truth in float64 and in float32, given the steps of `meant`, and
            raises AssertionError; None for each by itself.
        records: whether the call itself asks for gradients.
        returns_gradients: whether gradients are among its results.
        meant: after a call, what numbers tensors stand for that do not stand for themselves, and how far apart
            neighbours are there, by name.
    """

    name: str
    call: Callable[..., Any]
    bases: list[Callable[[], Arguments]]
    truth: Callable[[Arguments, torch.dtype], Results]
    written: frozenset[str] = frozenset()
    inside: tuple[str, ...] = ()
    has_oracle: bool = False
    judge: Judge | None = None
    records: bool = False
    returns_gradients: bool = False
    meant: Callable[[Arguments], dict[str, tuple[Tensor, Tensor] | None]] = lambda arguments: {}

    def results(self, returned: Any, arguments: Arguments) -> Results:
        """Return the tensors that a call returned and wrote."""
        tensors = returned if isinstance(returned, tuple) else (returned,)
        found = {f"result {i}": t for i, t in enumerate(tensors) if isinstance(t, Tensor)}
        found |= {n: a for n in self.written if isinstance(a := arguments.get(n), Tensor)}
        meant = self.meant(arguments)
        return {n: t for n, t in found.items() if n not in meant} | {n: m[0] for n, m in meant.items() if m is not None}


def targets(backend: str = "torch") -> list[Target]:
    """Return all that there is to call where a backend is asked for, but what `tests.fuzz.training` is about."""
    return [*(t for op in OPS for t in _op(op, backend)), *_layers(backend), *_compat(backend), *_formats()]


def on(backend: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a call where a backend is asked for."""

    def run(**arguments: Any) -> Any:
        with mamba_ops.use_backend(backend):
            return call(**arguments)

    return run


# -- ops --------------------------------------------------------------------------------------------------------------


def _op(op: registry.Op[...], backend: str) -> Iterator[Target]:
    if backend not in backends_here(op, CPU):
        return

    def truth(arguments: Arguments, dtype: torch.dtype) -> Results:
        empty = (n for n in caches if (t := arguments.get(n)) is not None and not t.numel())
        arguments = {**arguments, **dict.fromkeys(empty)}  # which stands for a cache that is left out
        args = tuple(arguments[p.name] for p in op.parameters if p.kind is not p.KEYWORD_ONLY)
        kwargs = {n: arguments[n] for n in list(arguments)[len(args) :]}
        found = expected(op, registry.Sample("fuzz", args, kwargs), dtype)
        output = found.pop("output")
        found.pop("state_scale", None)
        return {"result 0": output, **({"out": output} if arguments.get("out") is not None else {}), **found}

    caches = codegen.left_out(op.parameters, op.mutates)
    written = frozenset("out" if n == "output" else n for n in op.mutates)
    bases = [functools.partial(_arguments_of, op, sample) for sample in samples_for(op, backend, CPU)]
    meant = functools.partial(_meant, op)
    yield Target(op.name, on(backend, op), bases, truth, written, INSIDE if op.composed else (), True, meant=meant)


def _meant(op: registry.Op[...], arguments: Arguments) -> dict[str, tuple[Tensor, Tensor] | None]:
    given = {"output" if n == "out" else n: plain(a) for n, a in arguments.items()}
    if isinstance(scale := given.get("state_scale"), Tensor) and not scale.numel():
        given["state_scale"] = None  # as an empty cache stands for one that is left out
    return numbers_meant(op, given)


def _arguments_of(op: registry.Op[...], sample: registry.Sample) -> Arguments:
    copied = sample.clone()
    arguments = {n: a for n, a in op.bind(copied.args, copied.kwargs).items() if n not in op.returns}
    return {"out" if n == "output" else n: a for n, a in arguments.items()}


def in_dtype(call: Callable[..., Any], arguments: Arguments, dtype: torch.dtype) -> Results:
    """What the same call returns with all its floating-point tensors in another dtype, on the reference."""

    def converted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(dtype if value.is_floating_point() else value.dtype, copy=True)

    mine = {n: converted(value) for n, value in arguments.items()}
    with mamba_ops.use_backend("torch"):
        returned = call(**mine)
    tensors = returned if isinstance(returned, tuple) else (returned,)
    found = {f"result {i}": t for i, t in enumerate(tensors) if isinstance(t, Tensor)}
    return found | {n: v for n, v in mine.items() if isinstance(v, Tensor)}


def _scanned_in_place(arguments: Arguments, dtype: torch.dtype) -> Results:
    """What vLLM's scan leaves; a z or delta without adjacent tokens, which it should overwrite, stays as it is."""
    found = in_dtype(vllm.selective_scan_fn, arguments, dtype)
    return {n: t for n, t in found.items() if n not in ("z", "delta")}


# -- layers -----------------------------------------------------------------------------------------------------------


def layers() -> list[Any]:
    """One small layer of each class."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            Mamba(16, dstate=4),
            Mamba2(16, heads=2, head_dim=8, dstate=4, chunk_size=4),
            GatedDeltaNet(16, num_k_heads=1, num_v_heads=2, head_k_dim=8, head_v_dim=8),
            ShortConv(16),
            KimiDeltaAttention(16, num_heads=2, head_dim=8, lower_bound=-5.0),
            FalconH1Mamba2(16, heads=2, head_dim=8, dstate=4, chunk_size=4, multipliers=(0.9, 1.2, 0.6, 1.4, 0.8)),
            OlmoGatedDeltaNet(16, num_k_heads=1, num_v_heads=2, head_k_dim=8, head_v_dim=8),
            ZambaMamba(16, heads=2, d_inner=32, dstate=4, dt_rank=1),
            Mamba3(16, heads=2, head_dim=8, dstate=8, chunk_size=4),
            Mamba3(16, heads=2, head_dim=8, dstate=8, chunk_size=4, is_mimo=True, mimo_rank=2),
        ]


def _layers(backend: str) -> Iterator[Target]:
    for layer in layers():
        layer.requires_grad_(False)
        for name in ("forward", "step", *(["plan"] if layer.takes_plans else [])):
            truth = functools.partial(_of_layer, copy.deepcopy(layer), name)
            call = on(backend, layer.step if name == "step" else layer)
            base = functools.partial(_layer_call, layer, name)
            written = frozenset(layer.Caches._fields)
            yield Target(type(layer).__name__, call, [base], truth, written, inside=INSIDE)
            if layer.NarrowCaches is not None:
                base = functools.partial(_narrow_call, layer, name)
                truth = functools.partial(_of_narrow_layer, *truth.args)
                written = frozenset(layer.NarrowCaches._fields)
                yield Target(
                    type(layer).__name__, call, [base], truth, written, inside=INSIDE, meant=_meant_of_narrow_layer
                )


def _layer_call(layer: Any, name: str) -> Arguments:
    generator = torch.Generator().manual_seed(0)
    caches = layer.empty_caches(4)._asdict()
    caches = {name: torch.randn(cache.shape, generator=generator).to(cache) for name, cache in caches.items()}
    shape = {"forward": (2, 5, 16), "step": (2, 16), "plan": (6, 16)}[name]
    call = {"hidden_states": torch.randn(shape, generator=generator), **caches}
    if name == "plan":
        return {**call, "plan": Plan.of([3, 0], [1, 5], [2, 0], max_requests=3)}
    call |= {"slots": torch.tensor([2, 0]), "null_slot": -1}
    return call if name == "step" else {**call, "cu_seqlens": None, "has_initial_state": torch.tensor([True, False])}


def _narrow_call(layer: Any, name: str) -> Arguments:
    call = _layer_call(layer, name)
    state, scale = narrow_states(call.pop("ssm_state"))
    return {**call, "ssm_state": state, "state_scale": scale}


def _of_narrow_layer(layer: Any, name: str, arguments: Arguments, dtype: torch.dtype) -> Results:
    """What a layer leaves where its states are the numbers that narrow ones stand for."""
    state, scale = arguments["ssm_state"], arguments.get("state_scale")
    if scale is not None and scale.numel():  # an empty one stands for none, at an op
        arguments = {**arguments, "ssm_state": widen_states(plain(state), plain(scale), dtype)}
    return _of_layer(layer, name, {**arguments, "state_scale": None}, dtype)


def _meant_of_narrow_layer(arguments: Arguments) -> dict[str, tuple[Tensor, Tensor] | None]:
    state, scale = (plain(arguments.get(n)) for n in ("ssm_state", "state_scale"))
    return narrow.meant(state, scale) if isinstance(scale, Tensor) and scale.numel() else {}


def _of_layer(layer: Any, name: str, arguments: Arguments, dtype: torch.dtype) -> Results:
    mine = layer.to(dtype)
    return in_dtype(mine.step if name == "step" else mine, arguments, dtype)


# -- functions of states ---------------------------------------------------------------------------------------------


def _formats() -> Iterator[Target]:
    """Functions that widen states and narrow them, of which the scales are compared."""

    def states() -> Arguments:
        return {"states": torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)), "dtype": torch.int16}

    def narrowed() -> Arguments:
        state, scale = narrow_states(**states())
        return {"states": state, "state_scale": scale, "dtype": torch.float32}

    def scale(arguments: Arguments, dtype: torch.dtype) -> Results:
        most = 32767 if arguments["dtype"] == torch.int16 else 448
        largest = plain(arguments["states"]).to(dtype).abs().amax(-1) / most
        return {"result 1": torch.where(largest.isfinite(), largest.clamp(min=2.0**-126), torch.nan)}

    def product(arguments: Arguments, dtype: torch.dtype) -> Results:
        state, scale = (plain(arguments[n]).to(dtype) for n in ("states", "state_scale"))
        return {"result 0": state * scale.unsqueeze(-1)}

    yield Target("narrow_states", narrow_states, [states], scale, has_oracle=True)
    yield Target("widen_states", widen_states, [narrowed], product, has_oracle=True)


# -- functions of other libraries -------------------------------------------------------------------------------------


def _compat(backend: str) -> Iterator[Target]:
    for function, base, written in compat_calls():
        truth = _scanned_in_place if function is vllm.selective_scan_fn else functools.partial(in_dtype, function)
        yield Target(function.__name__, on(backend, function), [base], truth, written, inside=INSIDE)


def compat_calls() -> Iterator[tuple[Callable[..., Any], Callable[[], Arguments], frozenset[str]]]:
    """Functions of other libraries: each with a right call, and the names of what it writes."""
    for module, name, make, written in _compat_calls():
        function = getattr(module, name)
        defaults = {
            p.name: p.default
            for p in inspect.signature(function).parameters.values()
            if p.default is not p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        }

        def base(make: Callable[[], Arguments] = make, defaults: Arguments = defaults) -> Arguments:
            return {**defaults, **make()}

        yield function, base, frozenset(written.split())


def _compat_calls() -> Iterator[tuple[Any, str, Callable[[], Arguments], str]]:
    def make(integers: Arguments | None = None, **shapes: tuple[int, ...]) -> Callable[[], Arguments]:
        def call() -> Arguments:
            generator = torch.Generator().manual_seed(0)
            tensors = {n: torch.randn(shape, generator=generator) * 0.5 for n, shape in shapes.items()}
            for n in ("A", "g"):
                if n in tensors:
                    tensors[n] = -tensors[n].abs()
            return {**tensors, **{n: copy.deepcopy(v) for n, v in (integers or {}).items()}}

        return call

    slots, bounds = torch.tensor([2, 0]), torch.tensor([0, 4, 6])
    yield causal_conv1d, "causal_conv1d_fn", make(x=(2, 8, 6), weight=(8, 4), bias=(8,)), "final_states_out"
    initial = make({"return_final_states": True}, x=(2, 8, 6), weight=(8, 4), initial_states=(2, 8, 3))
    yield causal_conv1d, "causal_conv1d_fn", initial, "final_states_out"
    shapes: dict[str, tuple[int, ...]] = {"x": (2, 8), "conv_state": (3, 8, 3), "weight": (8, 4), "bias": (8,)}
    yield causal_conv1d, "causal_conv1d_update", make({"conv_state_indices": slots}, **shapes), "conv_state"
    circular = {"conv_state_indices": slots, "cache_seqlens": torch.tensor([2, 11])}
    long = make(circular, x=(2, 8, 3), conv_state=(3, 8, 9), weight=(8, 4), bias=(8,))
    yield causal_conv1d, "causal_conv1d_update", long, "conv_state"
    yield causal_conv1d, "causal_conv1d_varlen_states", make({"cu_seqlens": bounds, "state_len": 3}, x=(6, 8)), ""
    shapes = {"xz": (2, 16, 6), "conv1d_weight": (8, 1, 4), "conv1d_bias": (8,), "x_proj_weight": (11, 8)}
    shapes |= {"delta_proj_weight": (8, 3), "out_proj_weight": (5, 8), "A": (8, 4), "D": (8,), "delta_bias": (8,)}
    yield mamba_ssm, "mamba_inner_fn", make({"out_proj_bias": None}, **shapes), ""
    yield fla, "l2norm", make(x=(2, 6, 8)), ""
    shapes = {"state": (3, 2, 8, 4), "x": (2, 2, 8), "dt": (2, 2, 8), "A": (2, 8, 4), "B": (2, 1, 4), "C": (2, 1, 4)}
    known = {"state_batch_indices": slots, "dt_softplus": True}
    yield mamba_ssm, "selective_state_update", make(known, **shapes, D=(2, 8)), "state"
    known = {"state_batch_indices": slots, "out": torch.zeros(2, 2, 8)}
    yield vllm, "selective_state_update", make(known, **shapes, D=(2, 8), dt_bias=(2, 8)), "state out"
    shapes = {"u": (2, 8, 6), "delta": (2, 8, 6), "A": (8, 4), "B": (2, 4, 6), "C": (2, 4, 6), "z": (2, 8, 6)}
    known = {"return_last_state": True, "delta_softplus": True}
    yield mamba_ssm, "selective_scan_fn", make(known, **shapes), ""
    shapes = {"x": (2, 6, 2, 8), "dt": (2, 6, 2), "A": (2,), "B": (2, 6, 1, 4), "C": (2, 6, 1, 4), "D": (2,)}
    known = {"chunk_size": 4, "return_final_states": True, "dt_softplus": True}
    yield mamba_ssm, "mamba_chunk_scan_combined", make(known, **shapes, initial_states=(2, 2, 8, 4)), ""
    known = {"chunk_size": 4, "headdim": 8, "return_final_states": True}
    shapes = {
        "zxbcdt": (2, 6, 42),
        "conv1d_weight": (24, 4),
        "conv1d_bias": (24,),
        "dt_bias": (2,),
        "A": (2,),
        "D": (2,),
    }
    yield mamba_ssm, "mamba_split_conv1d_scan_combined", make(known, **shapes), ""
    shapes = {"q": (2, 6, 1, 8), "k": (2, 6, 1, 8), "v": (2, 6, 2, 8), "g": (2, 6, 2), "beta": (2, 6, 2)}
    known = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        yield fla, name, make(known, **shapes, initial_state=(2, 2, 8, 8)), ""
    for name in ("chunk_kda", "fused_recurrent_kda"):
        yield fla, name, make(known, **{**shapes, "g": (2, 6, 2, 8)}, initial_state=(2, 2, 8, 8)), ""
    yield vllm, "chunk_gated_delta_rule", make(known, **shapes, initial_state=(2, 2, 8, 8)), "core_attn_out"
    table = {"ssm_state_indices": torch.tensor([[3, 1, 4, 2, 5, 6], [7, 9, 8, 10, 11, 12]])}
    cache = {"initial_state": (13, 2, 8, 8)}
    yield vllm, "fused_recurrent_gated_delta_rule", make(table, **shapes, **cache), "initial_state"
    gates = {"A_log": (2,), "a": (12, 2), "b": (12, 2), "dt_bias": (2,)}
    tokens = {name: shapes[name] for name in "qkv"}
    yield vllm, "fused_sigmoid_gating_delta_rule_update", make(table, **gates, **tokens, **cache), "initial_state"
    gates |= {"a": (2, 2), "b": (2, 2)}
    known = {"ssm_state_indices": torch.tensor([3, 1]), "scale": 0.5}
    packed = make(known, mixed_qkv=(2, 32), **gates, **cache, out=(2, 1, 2, 8))
    yield vllm, "fused_recurrent_gated_delta_rule_packed_decode", packed, "initial_state out"
    known = {"num_k_heads": 1, "head_k_dim": 8, "head_v_dim": 8}
    yield vllm, "fused_post_conv_prep", make(known, conv_output=(2, 32), **gates), ""
    shapes = {"u": (8, 6), "ssm_states": (3, 8, 4), "delta": (8, 6), "A": (8, 4), "B": (1, 4, 6), "C": (1, 4, 6)}
    known = {"query_start_loc": bounds, "cache_indices": slots, "null_block_id": -1}
    yield vllm, "selective_scan_fn", make(known, **shapes), "ssm_states delta z"
    shapes = {"x": (8, 6), "weight": (8, 4), "bias": (8,), "conv_states": (3, 8, 3)}
    yield vllm, "causal_conv1d_fn", make(known, **shapes), "conv_states"
    known = {"conv_state_indices": slots, "null_block_id": -1}
    shapes = {"x": (2, 8), "conv_state": (3, 8, 3), "weight": (8, 4), "bias": (8,)}
    yield vllm, "causal_conv1d_update", make(known, **shapes), "x conv_state out"
    known = {
        "chunk_size": 4,
        "cu_seqlens": bounds,
        "cu_chunk_seqlens": bounds,
        "last_chunk_indices": torch.tensor([0, 1]),
    }
    known |= {"seq_idx": torch.tensor([0, 1]), "out": torch.zeros(6, 2, 8), "dt_bias": None, "z": None, "D": None}
    shapes = {"x": (6, 2, 8), "dt": (6, 2), "A": (2,), "B": (6, 1, 4), "C": (6, 1, 4), "final_states_out": (3, 2, 8, 4)}
    known |= {"final_state_indices": slots}
    yield vllm, "mamba_chunk_scan_combined_varlen", make(known, **shapes), "out final_states_out"
