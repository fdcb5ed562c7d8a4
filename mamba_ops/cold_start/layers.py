"""Every way in which serving calls a layer: whole sequences or packed ones, cached or not, decoding, planned."""

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamba_ops.layers import Mamba
from mamba_ops.layers.mixer import Mixer
from mamba_ops.layers.norms import GatedRMSNorm, RMSNorm
from mamba_ops.serving import Plan

TOKENS = 140  # of a prefill: more than one chunk, for every kernel with a fixed chunk size
SHORT = 5
MANY = (*(2**k for k in range(13)), *(5 * 2**k + 1 for k in range(3, 10)))
ROWS = tuple(2**k for k in range(3, 11))  # of plans: pinned memory of each size comes from the system once
SLOTS = 4
_NORMS = (RMSNorm, GatedRMSNorm)
_NOT_OF_KIND = ("layer_idx", "training")


class Layer(NamedTuple):
    """One kind of layer of a model, and the first module of that kind."""

    name: str
    module: nn.Module
    kind: tuple[Any, ...]
    config: Any


def layers_of(model: nn.Module) -> list[Layer]:
    """Return one layer of every kind among those that run on the ops: `mamba_ops.layers`, and Transformers' when bound.

    Norms, of `mamba_ops.layers` and of models that are bound, count as layers where they are not part of one. One
    without a weight does not: of which size its channels are is not known before it is called.

    Layers are of one kind if they have the same class, the same numbers as attributes, and parameters of the same
    shapes and dtypes; under tensor parallelism these are this rank's own.
    """
    found: dict[tuple[Any, ...], Layer] = {}
    config = getattr(model, "config", None)
    parts: set[nn.Module] = set()  # of layers, which call them
    for name, module in model.named_modules():  # parts come after the layer
        if isinstance(module, Mixer) or _is_bound_mixer(module) or (_is_norm(module) and module not in parts):
            parts.update(module.modules())
            kind = _kind(module)
            if kind not in found:
                own = getattr(module, "config", None)
                found[kind] = Layer(name or type(module).__name__, module, kind, config if own is None else own)
    is_warm = any(_form(layer.module) is None for layer in found.values())  # not norms of Transformers alone
    return list(found.values()) if is_warm else []


def _is_bound_mixer(module: nn.Module) -> bool:
    """Whether a module is a mixer of Transformers that calls our functions."""
    bound = sys.modules.get("mamba_ops.compat.transformers")
    if bound is None or not bound.is_bound(module) or not hasattr(module, "conv1d"):
        return False
    return any(hasattr(part, "A_log") for part in (module, *module.children()))


def _is_mamba1(module: nn.Module) -> bool:
    """Whether a module is a mixer of Mamba-1, of ours or of Transformers: those alone find B, C and dt together."""
    return isinstance(module, Mamba) or hasattr(module, "x_proj")


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or (getattr(_form(module), "weight", None) is not None)


def _form(module: nn.Module) -> Any:
    """Return what a norm of Transformers computes, if it is one call of the op now."""
    norms = sys.modules.get("mamba_ops.compat.transformers_norms")
    return None if norms is None else norms.bound_form(module)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    plain = (bool, int, float, str, tuple)
    numbers = {n: v for n, v in vars(module).items() if isinstance(v, plain) and n not in _NOT_OF_KIND}
    tensors = [(n, tuple(t.shape), t.dtype) for n, t in module.state_dict(keep_vars=True).items()]
    return (type(module), repr(sorted(numbers.items())), tuple(tensors))


def on_device(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Return the module itself, or a copy with random parameters if it has another device or dtype."""
    tensors = [*module.parameters(), *module.buffers()]
    if all(t.device == device and (dtype is None or not t.is_floating_point() or t.dtype == dtype) for t in tensors):
        return module
    memo: dict[int, Any] = {}
    for t in tensors:
        new = torch.randn(t.shape, device=device, dtype=torch.float32) * 0.1
        like = new.to(dtype if dtype and t.is_floating_point() else t.dtype)
        memo[id(t)] = nn.Parameter(like, requires_grad=False) if isinstance(t, nn.Parameter) else like
    return copy.deepcopy(module, memo)


def calls_of(layer: Layer, module: nn.Module, state_dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield every call of a layer that serving may make, with its name."""
    if _is_norm(module):
        yield "a norm", partial(_normalise, module)
        return
    calls = _calls_of_transformers(layer, module)
    if isinstance(module, Mixer):
        calls = _calls_of_ours(module, state_dtype)
    for name, call in calls:
        yield name, call
        if _is_mamba1(module):  # its scan has other launches for many rows
            yield f"{name}, many rows", with_many_rows(call)


def training_calls_of(layer: Layer, module: nn.Module) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the steps of training that a layer may be in, each with a forward and a backward, and their names."""
    if _is_norm(module):
        return  # where gradients are recorded they run in torch
    weight = next(m for m in module.modules() if isinstance(m, nn.Linear)).weight
    parameters = {n: p.detach().requires_grad_(p.is_floating_point()) for n, p in module.named_parameters()}
    size: Any = getattr(module, "hidden_size", weight.shape[1])

    def step(lead: tuple[int, ...], **options: Any) -> None:
        hidden = torch.randn(*lead, size, device=weight.device, dtype=weight.dtype, requires_grad=True)
        # In one thread: in autograd's own for a device nothing is known of this warm-up.
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            output = torch.func.functional_call(module, parameters, (hidden,), options)
            output = output[0] if isinstance(output, tuple) else output
            inputs = [hidden, *(p for p in parameters.values() if p.requires_grad)]
            torch.autograd.grad(output, inputs, torch.randn_like(output), allow_unused=True)

    for tokens, short in ((TOKENS, ""), (SHORT, ", short")):
        yield f"training, whole sequences{short}", partial(step, (2, tokens))
        if isinstance(module, Mixer):
            packed = torch.tensor([0, 1, tokens], dtype=torch.int32, device=weight.device)
            yield f"training, packed{short}", partial(step, (tokens,), cu_seqlens=packed)
    yield "training, many sequences", with_many_rows(partial(step, (2, SHORT)))
    if isinstance(module, Mixer):  # `packed` has SHORT tokens now
        yield "training, many packed sequences", with_many_rows(partial(step, (SHORT,), cu_seqlens=packed))


def with_many_rows(call: Callable[[], object]) -> Callable[[], object]:
    """Return a call that runs as if it had many rows."""

    def run() -> object:
        if (slices := sys.modules.get("mamba_ops.ops._triton.slices")) is None:
            return None  # nothing that was called before depends on it
        with slices.as_with_many_rows():
            return call()

    return run


def before_calls_of(module: nn.Module) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield calls without ops that are slow the first time on a GPU."""
    if _is_norm(module):
        return
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear) and linear.weight.dtype in (torch.float16, torch.bfloat16, torch.float32):
            yield name, partial(_multiply, linear)
    device = next(module.parameters()).device
    yield "plans", lambda: [Plan.zeros(1, max_requests=rows, device=device) for rows in ROWS]


def torchs_norms_of(model: nn.Module) -> list[nn.Module]:
    """Return one norm of torch's own of every kind in a model: their kernels are slow the first time on a GPU, too."""
    kinds = {_kind(m): m for m in model.modules() if isinstance(m, (nn.RMSNorm, nn.LayerNorm))}
    return list(kinds.values())


def call_norm(norm: nn.Module) -> None:
    """Call a norm of torch's, as a layer is called in one step and as in a prompt."""
    parameter = next(norm.parameters(), None)
    if parameter is not None and parameter.is_floating_point():
        shape: tuple[int, ...] = norm.normalized_shape  # type: ignore[assignment]
        for tokens in (1, TOKENS):
            norm(torch.randn(tokens, *shape, device=parameter.device, dtype=parameter.dtype))


def rehearsal_of(module: nn.Module, state_dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what serving does in each step with a layer of `mamba_ops.layers`: make a plan and run it."""
    if not (isinstance(module, Mixer) and module.takes_plans):
        return
    weight = module.out_proj.weight

    def step() -> None:
        plan, _, _ = _plans(TOKENS, weight.device)
        hidden = torch.randn(plan.tokens, weight.shape[0], device=weight.device, dtype=weight.dtype)
        module(hidden, *module.empty_caches(SLOTS, state_dtype=state_dtype), plan=plan)

    yield from [("a plan", step)] * 2


def _normalise(norm: nn.Module) -> None:
    """Call a norm; one of Transformers in float32 too, in which some models keep what they add up."""
    weight: Any = norm.weight
    form = _form(norm)
    gates = [isinstance(norm, GatedRMSNorm)] if form is None else [g for g in (False, True) if form.takes(g)]
    for dtype in {weight.dtype, weight.dtype if form is None else torch.float32}:
        x = torch.randn(2, weight.shape[0], device=weight.device, dtype=dtype)
        for gate in gates:
            norm(x, x) if gate else norm(x)


def _multiply(linear: nn.Linear) -> None:
    """Multiply matrices of many sizes: for many of them libraries load another kernel."""
    tokens = torch.randn(max(MANY), linear.in_features, device=linear.weight.device, dtype=linear.weight.dtype)
    for count in MANY:
        linear(tokens[:count])


def _calls_of_ours(module: Mixer[Any], state_dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    weight = module.out_proj.weight
    device, size = weight.device, weight.shape[0]

    def hidden(*lead: int) -> Tensor:
        return torch.randn(*lead, size, device=device, dtype=weight.dtype)

    def caches(columns: int = 1) -> list[Tensor]:
        return [torch.randn_like(t) for t in module.empty_caches(SLOTS, state_dtype=state_dtype, columns=columns)]

    slots = torch.tensor([2, 0], dtype=torch.int32, device=device)
    known = torch.tensor([True, False], device=device)
    lengths = {TOKENS: ""}
    if _is_mamba1(module):  # its scan has other launches where no row can have more than a chunk
        lengths[SHORT] = ", short"
    for tokens, short in lengths.items():
        packed = torch.tensor([0, 1, tokens], dtype=torch.int32, device=device)
        for lead, cu_seqlens, what in (((2, tokens), None, "whole sequences"), ((tokens,), packed, "packed")):
            yield f"{what}{short}", partial(lambda lead, cu: module(hidden(*lead), cu_seqlens=cu), lead, cu_seqlens)
            for where, where_words in ((None, ""), (slots, ", slots")):
                for initial, initial_words in ((None, ""), (known, ", initial states")):
                    options = {"cu_seqlens": cu_seqlens, "slots": where, "has_initial_state": initial}
                    name = f"{what}{short}, cached{where_words}{initial_words}"
                    yield (
                        name,
                        partial(lambda lead, options: module(hidden(*lead), *caches(), **options), lead, options),
                    )
    for lead, what in (((2,), "one token"), ((2, 2), "a few tokens")):
        for where, words in ((None, ""), (slots, ", slots")):
            yield (
                f"{what}{words}",
                partial(lambda lead, at: module.step(hidden(*lead), *caches(), slots=at), lead, where),
            )
    for tokens, short in lengths.items() if module.takes_plans else ():
        plan, sharing, speculative = _plans(tokens, device)
        yield f"a plan{short}", partial(lambda plan: module(hidden(plan.tokens), *caches(), plan=plan), plan)
        yield (
            f"a plan that keeps states{short}",
            partial(lambda plan: module(hidden(plan.tokens), *caches(), plan=plan), sharing),
        )
        yield (
            f"a speculative plan{short}",
            partial(lambda plan: module(hidden(plan.tokens), *caches(columns=2), plan=plan), speculative),
        )


def _plans(tokens: int, device: torch.device) -> tuple[Plan, Plan, Plan]:
    """Return plans of a decode and two prefills, one of them from a state.

    The second keeps a state, the third's decode has two tokens.
    """
    rows: dict[str, Any] = {"max_requests": 8, "device": device}
    plain = Plan.of([9, 0, 5], [1, tokens - 3, 3], [0, 1, 2], **rows)
    table = [[0, 1], [2, -1], [3, -1]]
    sharing = Plan.of([9, 0, 5], [1, tokens - 3, 3], [0, 1, 2], keep=[None, {1: 3}, None], rounds=2, **rows)
    return plain, sharing, Plan.of([9, 0, 5], [2, tokens - 3, 3], table, accepted=[2, 0, 0], **rows)


def _calls_of_transformers(layer: Layer, module: nn.Module) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a Transformers mixer's own calls: it takes the hidden states first, and the model's cache."""
    first = next(m for m in module.modules() if isinstance(m, nn.Linear))
    size: Any = getattr(module, "hidden_size", first.in_features)
    device, dtype = first.weight.device, first.weight.dtype

    def hidden(rows: int, tokens: int) -> Tensor:
        return torch.randn(rows, tokens, size, device=device, dtype=dtype)

    def cached(tokens: int) -> None:
        from transformers import DynamicCache

        from mamba_ops.compat.transformers import cache_keyword

        cache = DynamicCache(config=layer.config)
        for count in (tokens, 1, 1):
            module(hidden(2, count), **{cache_keyword(module): cache})

    for tokens, what in ((TOKENS, "whole sequences"), (SHORT, "short ones"), (1, "one token")):
        yield what, partial(lambda tokens: module(hidden(2, tokens)), tokens)
        yield f"{what}, cached, then tokens", partial(cached, tokens)
