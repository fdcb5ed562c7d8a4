"""The gradients of mamba3_chunk_scan: what stands for a call that records them, made of ops that do."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from mamba_ops.ops._common.checking import floating, one_device, shape_is
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.delta_rule_update import sigmoid
from mamba_ops.ops._common.mamba3 import (
    Layout,
    Ranks,
    Scanned,
    State,
    Tokens,
    by_head,
    layout,
    operands_dtype,
    scan,
    sums_in_blocks,
)
from mamba_ops.ops._common.mamba3_checks import CACHES, cache_sizes, output_shape
from mamba_ops.ops.mamba3_chunk_scan.op import Arguments, mamba3_chunk_scan
from mamba_ops.ops.mamba_chunk_scan import mamba_chunk_scan as chunk_scan
from mamba_ops.registry import bad_argument
from mamba_ops.registry.errors import in_call_of
from mamba_ops.registry.sharding import refuse_distributed


class Mamba3States(NamedTuple):
    """What rows of mamba3_chunk_scan begin with, and what they end with.

    Attributes:
        angle_state: `(n, heads, angles)`, how far the state is turned.
        ssm_state: `(n, heads, dim, dstate)`.
        k_state: `(n, heads, dstate)`, B of the last token, turned. MIMO: `(n, rank, heads, dstate)`.
        v_state: `(n, heads, dim)`, x of the last token.
    """

    angle_state: Tensor
    ssm_state: Tensor
    k_state: Tensor
    v_state: Tensor


@mamba3_chunk_scan.recorded_as
def _recorded(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    angles: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    options = B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, cu_seqlens
    return recorded(call_of(x, dt, A, trap, angles, B, C, chunk_size, *options), keeps=False)[0]


def with_states(*inputs: Any, initial_states: Sequence[Tensor] | None) -> tuple[Tensor, Mamba3States]:
    """Return the output and the final states of a call, given the op's parameters that come before its caches.

    Where nothing is to be recorded that is the op itself.
    """
    call = call_of(*inputs)
    initial = states_of(call, initial_states)
    values = (*inputs, *(initial or ()))
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values):
        y, ended = recorded(call, initial)
        return y, cast(Mamba3States, ended)
    n, states = row_count(call.x, call.cu_seqlens), new_states(call, initial)
    options: dict[str, Any] = call._asdict() | states._asdict()
    if initial is not None and n > 0:
        options["has_initial_state"] = torch.ones(n, dtype=torch.bool, device=call.x.device)
    del options["output"]
    return mamba3_chunk_scan(**options), states


def call_of(*inputs: Any) -> Arguments:
    """Return a call without caches, of the op's parameters that come before them, or raise the ValueError about it."""
    if not torch.compiler.is_compiling():
        names = Arguments._fields[: len(inputs)]
        size = names.index("chunk_size")
        inputs = *inputs[:size], operator.index(inputs[size]), *inputs[size + 1 :]
    call = Arguments(*inputs, *[None] * (len(Arguments._fields) - len(inputs)))._replace(null_slot=-1)
    refuse_distributed(mamba3_chunk_scan, [value for name, value in call._asdict().items() if name not in _NUMBERS])
    mamba3_chunk_scan.check(call._asdict(), has_memory=False)
    if call.x.is_cpu and not torch.compiler.is_compiling():
        try:
            mamba3_chunk_scan.facets["validate_values"](**call._asdict())
        except ValueError as error:
            raise in_call_of(mamba3_chunk_scan.qualname, error) from None
    return call


_NUMBERS = ("chunk_size", "null_slot")


def states_of(call: Arguments, given: Sequence[Tensor] | None) -> Mamba3States | None:
    """Return the initial states of a call's rows, or raise the ValueError about them."""
    if given is None:
        return None
    n = row_count(call.x, call.cu_seqlens)
    try:
        if not isinstance(given, tuple | list) or len(given) != len(CACHES):
            got = f"{len(given)} of them" if isinstance(given, tuple | list) else f"a {type(given).__name__}"
            raise bad_argument("initial_states", got=got, expected=f"{', '.join(CACHES)}, or None")
        for name, state in zip(CACHES, given, strict=True):
            shown = f"initial_states: {name}"
            if not isinstance(state, Tensor):
                got = "None" if state is None else f"a {type(state).__name__}"
                raise bad_argument(shown, got=got, expected="a torch.Tensor", hint="all four, or none")
            floating(**{shown: state})
            shape_is(shown, state, (n, *cache_sizes(call)[name]), hint="a state for each row")
            one_device(call.x.device, **{shown: state})
    except ValueError as error:
        raise in_call_of(mamba3_chunk_scan.qualname, error) from None
    return Mamba3States(*given)


def new_states(call: Arguments, initial: Mamba3States | None) -> Mamba3States:
    """Return copies of initial states, or zeros: what is turned and states in float32 at least, the others in the
    dtypes in which they are read.
    """
    if initial is not None:
        return Mamba3States(*(state.clone() for state in initial))
    n, x, sizes = row_count(call.x, call.cu_seqlens), call.x, cache_sizes(call)
    kept = torch.promote_types(x.dtype, torch.float32)
    dtypes = dict(zip(CACHES, (kept, kept, operands_dtype(x, call.B, call.C), x.dtype), strict=True))
    return Mamba3States(*(x.new_zeros((n, *sizes[name]), dtype=dtypes[name]) for name in CACHES))


def recorded(
    call: Arguments, initial: Mamba3States | None = None, *, keeps: bool = True
) -> tuple[Tensor, Mamba3States | None]:
    """Make a call of ops that record gradients; return the output and, with `keeps`, the final states.

    What rows get, forward and backward, depends on nothing of other rows, nor on tokens that are in no row.
    """
    x, compute = call.x, torch.promote_types(call.x.dtype, torch.float32)
    if x.numel() == 0 or row_count(x, call.cu_seqlens) == 0:
        return _of_nothing(call, initial, keeps)
    rows, heads = layout(x, call.cu_seqlens), x.shape[-2]

    def packed(tensor: Tensor) -> Tensor:
        if call.cu_seqlens is None:
            return tensor.flatten(0, 1).to(compute)
        return torch.where(_like(rows.owned, tensor), tensor, 0).to(compute)

    k, q = (by_head(packed(t), bias, heads, compute) for t, bias in ((call.B, call.B_bias), (call.C, call.C_bias)))
    ranks, rank = Ranks.of(call.mimo_x, call.mimo_z, call.mimo_o, compute), k.shape[1]
    given = packed(x), packed(call.dt), packed(call.A), packed(call.trap), packed(call.angles)
    tokens = Tokens(*given, k, q, ranks)
    ends = call.cu_seqlens if call.cu_seqlens is not None else functional.pad(rows.ends, (1, 0))
    before = None if initial is None else Mamba3States(*(state.to(compute) for state in initial))
    state, last_states = None, []
    if before is not None:
        k_state = before.k_state if before.k_state.dim() == 4 else before.k_state.unsqueeze(1)
        state = State(before.angle_state, k_state, before.v_state)

    def run(*arguments: Any, cu_seqlens: Tensor) -> Tensor:
        """Scan rows as they were given, which the op checks."""
        of_ranks = ends if rank == 1 else ends * rank
        states = None if before is None else before.ssm_state
        if not keeps:
            return chunk_scan.forward_op(*arguments, None, None, None, states, of_ranks)
        y, last_state = cast(Any, chunk_scan.forward_states_op(*arguments, None, None, None, states, of_ranks))
        last_states.append(last_state)
        return cast(Tensor, y)

    def row_sums(values: Tensor, first: Tensor | None) -> Tensor:
        """Sum up; packed rows by a scan whose states do not decay, as one sum over all tokens would mix them."""
        if call.cu_seqlens is None:
            by_row = values.view(*x.shape[:2], *values.shape[1:])
            sums = by_row.cumsum(1) if x.is_cpu else sums_in_blocks(by_row.transpose(0, 1)).transpose(0, 1)
            return (sums if first is None else sums + first.unsqueeze(1)).flatten(0, 1)
        one, states = values.new_ones(values.shape[0], 1, 1), None if first is None else first.unsqueeze(-1)
        steps, rates, size = torch.ones_like(values[..., 0]), values.new_zeros(heads), min(call.chunk_size, 16)
        return chunk_scan.forward_op(values, steps, rates, one, one, size, None, None, None, states, ends)

    dtype = operands_dtype(x, call.B, call.C)
    found = scan(tokens, rows, run, call.chunk_size, dtype, state=state, row_sums=row_sums)
    y = ranks.finish(found.y, tokens.x, call.D, None if call.z is None else packed(call.z)).to(x.dtype)
    if call.cu_seqlens is not None:
        y = torch.where(_like(rows.owned, y), y, 0)
    y = y.view(*x.shape[:-2], *y.shape[1:])
    return y, _last(call, tokens, rows, found, last_states[0], initial) if keeps else None


def _last(
    call: Arguments, tokens: Tokens, rows: Layout, found: Scanned, scanned: Tensor, initial: Mamba3States | None
) -> Mamba3States:
    """Return the final states, given the scan's: what the last token adds is not in it, see `_common/mamba3.py`."""
    last, is_empty = (rows.ends - 1).clamp(min=0), rows.starts == rows.ends
    early, v, k = sigmoid(tokens.trap[last]) * tokens.dt[last], tokens.x[last], found.k[last]
    values = (early[:, None, :, None] * tokens.ranks.spread(v)).transpose(1, 2)  # (n, heads, rank, dim)
    read = k.to(operands_dtype(call.x, call.B, call.C)).to(v.dtype).transpose(1, 2)
    own = values.mT * read if values.shape[2] == 1 else values.mT @ read
    ssm_state = scanned + torch.where(_like(is_empty, own), 0, own)
    begun = new_states(call, initial) if initial is None else initial
    ended = Mamba3States(found.angle[last], ssm_state, k if call.mimo_x is not None else k.squeeze(1), v)
    pairs = zip(ended, begun, strict=True)
    return Mamba3States(*(torch.where(_like(is_empty, old), old, new.to(old.dtype)) for new, old in pairs))


def _of_nothing(call: Arguments, initial: Mamba3States | None, keeps: bool) -> tuple[Tensor, Mamba3States | None]:
    """Return what a call without tokens or rows does: zeros, initial states, and gradients of zero."""
    inputs = [value for value in call[:-1] if isinstance(value, Tensor) and value.is_floating_point()]
    nothing = sum((tensor.flatten()[:0].sum() for tensor in inputs), call.x.new_zeros(()))
    y = call.x.new_zeros(output_shape(call.x, call.mimo_x, call.mimo_o)) + nothing
    states = Mamba3States(*(state + nothing for state in new_states(call, initial))) if keeps else None
    return y, states


def _like(of_row: Tensor, tensor: Tensor) -> Tensor:
    return of_row.view(-1, *[1] * (tensor.dim() - 1))
