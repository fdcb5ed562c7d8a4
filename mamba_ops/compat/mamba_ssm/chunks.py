"""The steps of mamba_ssm's chunked scan, one by one, in torch's own functions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from mamba_ops.compat.arguments import States, floating, floating_dtypes, upcast, whole, written
from mamba_ops.ops._common.decay import limited
from mamba_ops.registry import answering


def _shaped(function: str, name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    if tensor is not None and tensor.shape != tuple(shape):
        raise ValueError(f"{function}: {name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def _check_chunks(function: str, x: Tensor, dt: Tensor, dA_cumsum: Tensor, **groups: Tensor) -> None:
    """Raise unless steps are of the chunks of x, and B or C of its tokens and of groups of its heads."""
    for name, tensor in {"x": x, "dt": dt, **groups}.items():
        if tensor.dim() != 4:
            raise ValueError(f"{function}: {name}: got shape {tuple(tensor.shape)}, expected 4 axes")
    (batch, length, heads, _), (chunks, size) = x.shape, dt.shape[2:]
    if not (chunks - 1) * size < length <= chunks * size:
        expected = f"as many chunks of {size} as {length} tokens take"
        raise ValueError(f"{function}: dt: got {chunks} chunks, expected {expected}")
    _shaped(function, "dt", dt, (batch, heads, chunks, size))
    _shaped(function, "dA_cumsum", dA_cumsum, dt.shape)
    for name, tensor in groups.items():
        _shaped(function, name, tensor, (batch, length, *tensor.shape[2:]))
        if not tensor.shape[2] or heads % tensor.shape[2]:
            expected = f"a divisor of the {heads} heads"
            raise ValueError(f"{function}: {name}: got {tensor.shape[2]} groups, expected {expected}")


def _in_chunks(tokens: Tensor, chunks: int, size: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Return `(batch, length, heads or groups, n)` as `(batch, chunks, size, heads, n)`, padded with zeros."""
    tokens = pad(tokens.to(dtype), (0, 0, 0, 0, 0, chunks * size - tokens.shape[1]))
    pieces: Tensor = tokens.unflatten(1, (chunks, size))
    return pieces.repeat_interleave(heads // tokens.shape[2], dim=3)


@answering
def chunk_cumsum(
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> States:
    """Return the sums of dt * A from each chunk's begin, and dt, both float32 `(batch, heads, chunks, chunk_size)`.

    Args:
        dt: `(batch, length, heads)`. Steps beyond the length are zero.
        A: `(heads,)`.
        chunk_size: of every chunk.
        dt_bias: `(heads,)`.
        dt_softplus: whether softplus is applied to dt after the bias.
        dt_limit: the least and the largest dt.
    """
    floating("chunk_cumsum", dt=dt, A=A, dt_bias=dt_bias)
    whole("chunk_cumsum", chunk_size=chunk_size)
    if dt.dim() != 3:
        raise ValueError(f"chunk_cumsum: dt: got shape {tuple(dt.shape)}, expected (batch, length, heads)")
    for name, tensor in {"A": A, "dt_bias": dt_bias}.items():
        _shaped("chunk_cumsum", name, tensor, dt.shape[2:])
    if len(dt_limit) != 2:
        raise ValueError(f"chunk_cumsum: dt_limit: got {dt_limit}, expected the least and the largest step")
    step = dt.to(upcast(dt)) if dt_bias is None else dt.to(upcast(dt)) + dt_bias.to(upcast(dt))
    step = limited(softplus(step) if dt_softplus else step, *dt_limit)
    step = pad(step, (0, 0, 0, -dt.shape[1] % chunk_size)).unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2)
    return (step * A.view(-1, 1, 1).to(step.dtype)).cumsum(-1), step


@answering
def chunk_state(B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, states_in_fp32: bool = True) -> Tensor:
    """Return what each chunk leaves of nothing, `(batch, chunks, heads, dim, dstate)`.

    Args:
        B: `(batch, length, groups, dstate)`.
        x: `(batch, length, heads, dim)`.
        dt, dA_cumsum: `(batch, heads, chunks, chunk_size)`: steps, and the sums of dt * A from the chunk's begin.
        states_in_fp32: whether the states are float32, else of B's dtype.
    """
    return _states("chunk_state", B, x, dt, dA_cumsum, None, None, states_in_fp32)


@answering
def chunk_state_fwd(
    B: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    seq_idx: Tensor | None = None,
    states: Tensor | None = None,
    states_in_fp32: bool = True,
) -> Tensor:
    """Do what `chunk_state` does, for several sequences in a row: a chunk's state is of its last token's sequence.

    Args:
        B, x, dt, dA_cumsum, states_in_fp32: as for `chunk_state`.
        seq_idx: integers `(batch, length)`, which sequence each token is of.
        states: written and returned, where it is given.
    """
    return _states("chunk_state_fwd", B, x, dt, dA_cumsum, seq_idx, states, states_in_fp32)


def _states(
    name: str,
    B: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    seq_idx: Tensor | None,
    states: Tensor | None,
    states_in_fp32: bool,
) -> Tensor:
    floating(name, B=B, x=x, dt=dt, dA_cumsum=dA_cumsum, states=states)
    _check_chunks(name, x, dt, dA_cumsum, B=B)
    compute, (chunks, size), heads = upcast(x), dt.shape[2:], x.shape[2]
    _shaped(name, "states", states, (x.shape[0], chunks, heads, x.shape[3], B.shape[3]))
    written(name, states=states)
    b, u = (_in_chunks(t, chunks, size, heads, compute) for t in (B, x))
    left = torch.exp((dA_cumsum[..., -1:] - dA_cumsum).to(compute)) * dt.to(compute)
    if seq_idx is not None:
        _check_seq_idx(name, seq_idx, x.shape[:2])
        numbers, last = _numbers_in_chunks(seq_idx, chunks, size)
        left = left.masked_fill((numbers != last.unsqueeze(-1)).unsqueeze(1), 0.0)
    found = torch.einsum("bclhn,bhcl,bclhp->bchpn", b, left, u)
    if states is not None:
        return states.copy_(found)
    return found if states_in_fp32 else found.to(B.dtype)


@answering
def chunk_state_varlen(
    B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, cu_seqlens: Tensor, chunk_states: Tensor
) -> Tensor:
    """Return the state after each sequence of one row, `(sequences, heads, dim, dstate)`; of an empty one zeros.

    Args:
        B: `(length, groups, dstate)`.
        x: `(length, heads, dim)`.
        dt, dA_cumsum: `(heads, chunks, chunk_size)`, as for `chunk_state`.
        cu_seqlens: integers `(sequences + 1,)`: where each sequence begins, and where the last ends. Beyond the row
            there are no tokens.
        chunk_states: `(chunks, heads, dim, dstate)`, the states before each chunk, of its sequences alone.
    """
    floating("chunk_state_varlen", B=B, x=x, dt=dt, dA_cumsum=dA_cumsum, chunk_states=chunk_states)
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        got, expected = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}", "integers of shape (sequences + 1,)"
        raise ValueError(f"chunk_state_varlen: cu_seqlens: got {got}, expected {expected}")
    _check_chunks("chunk_state_varlen", x[None], dt[None], dA_cumsum[None], B=B[None])
    sizes = (dt.shape[1], *x.shape[1:], B.shape[2])
    _shaped("chunk_state_varlen", "chunk_states", chunk_states, sizes)
    compute, size, per_group = upcast(x), dt.shape[-1], x.shape[1] // B.shape[1]
    begins, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    last = (ends - 1).clamp(0, x.shape[0] - 1)
    chunk = last // size
    tokens = (chunk * size).unsqueeze(1) + torch.arange(size, device=x.device)  # (sequences, chunk_size)
    is_own = (tokens >= begins.unsqueeze(1)) & (tokens < ends.unsqueeze(1))
    sums = dA_cumsum.to(compute)[:, chunk]
    until = sums.gather(-1, (last % size).expand(sums.shape[0], -1).unsqueeze(-1))
    left = torch.exp((until - sums).masked_fill(~is_own, -math.inf)) * dt.to(compute)[:, chunk]
    seen = tokens.clamp(max=x.shape[0] - 1)
    b, u = B[seen].to(compute), x[seen].to(compute).unflatten(2, (-1, per_group))
    left = left.unflatten(0, (-1, per_group))
    found = torch.einsum("slgn,gksl,slgkp->sgkpn", b, left, u).flatten(1, 2)
    goes_on = (begins < chunk * size).view(-1, 1, 1, 1)
    carried = chunk_states.to(compute)[chunk] * torch.exp(until).permute(1, 0, 2).unsqueeze(-1)
    return (found + torch.where(goes_on, carried, 0.0)).to(chunk_states.dtype)


@answering
def state_passing(states: Tensor, dA_chunk_cumsum: Tensor, initial_states: Tensor | None = None) -> States:
    """Return the states before each chunk, `(batch, chunks, heads, n)`, and those after the last, `(batch, heads, n)`.

    Args:
        states: `(batch, chunks, heads, n)`, what each chunk leaves of nothing.
        dA_chunk_cumsum: `(batch, heads, chunks)`, the sum of dt * A over each chunk.
        initial_states: `(batch, heads, n)`; None: zeros.
    """
    return _passed("state_passing", states, dA_chunk_cumsum, initial_states, None, None, None)


@answering
def state_passing_fwd(
    states: Tensor,
    dA_chunk_cumsum: Tensor,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> States:
    """Do what `state_passing` does, for several sequences in a row: a chunk that ends another one forgets.

    Args:
        states, dA_chunk_cumsum, initial_states: as for `state_passing`.
        seq_idx: integers `(batch, length)`, which sequence each token is of; sequence 0 has the initial states.
        chunk_size: needed with `seq_idx`.
        out_dtype: of the states before each chunk; None: as `states`.
    """
    return _passed("state_passing_fwd", states, dA_chunk_cumsum, initial_states, seq_idx, chunk_size, out_dtype)


def _passed(
    name: str,
    states: Tensor,
    dA_chunk_cumsum: Tensor,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int | None,
    out_dtype: torch.dtype | None,
) -> States:
    floating(name, states=states, dA_chunk_cumsum=dA_chunk_cumsum, initial_states=initial_states)
    floating_dtypes(name, out_dtype=out_dtype)
    if states.dim() != 4:
        expected = "(batch, chunks, heads, n)"
        raise ValueError(f"{name}: states: got shape {tuple(states.shape)}, expected {expected}")
    batch, chunks, heads, n = states.shape
    _shaped(name, "dA_chunk_cumsum", dA_chunk_cumsum, (batch, heads, chunks))
    _shaped(name, "initial_states", initial_states, (batch, heads, n))
    compute = upcast(states)
    state = torch.zeros_like(states[:, 0], dtype=compute) if initial_states is None else initial_states.to(compute)
    decay, before = torch.exp(dA_chunk_cumsum.to(compute)), []
    if seq_idx is not None:
        whole(name, chunk_size=chunk_size)
        assert chunk_size is not None
        _check_seq_idx(name, seq_idx, (batch, seq_idx.shape[-1]))
        if not (chunks - 1) * chunk_size < seq_idx.shape[-1] <= chunks * chunk_size:
            got, expected = f"{seq_idx.shape[-1]} tokens", f"as many as {chunks} chunks of {chunk_size} hold"
            raise ValueError(f"{name}: seq_idx: got {got}, expected {expected}")
        last = pad(_numbers_in_chunks(seq_idx, chunks, chunk_size)[1], (1, 0))
        decay = decay.masked_fill((last[:, 1:] != last[:, :-1]).unsqueeze(1), 0.0)
    for chunk in range(chunks):
        before.append(state)
        state = state * decay[:, :, chunk].unsqueeze(-1) + states[:, chunk]
    return torch.stack(before, dim=1).to(out_dtype or states.dtype), state


def _check_seq_idx(function: str, seq_idx: Tensor, shape: Sequence[int]) -> None:
    if seq_idx.shape != tuple(shape) or seq_idx.is_floating_point():
        got = f"{seq_idx.dtype} of shape {tuple(seq_idx.shape)}"
        expected = f"integers of shape {tuple(shape)}: which sequence each token is of"
        raise ValueError(f"{function}: seq_idx: got {got}, expected {expected}")


def _numbers_in_chunks(seq_idx: Tensor, chunks: int, size: int) -> tuple[Tensor, Tensor]:
    """Return each token's sequence, `(batch, chunks, size)`, and the last token's of each chunk, `(batch, chunks)`."""
    length = seq_idx.shape[1]
    numbers = pad(seq_idx, (0, chunks * size - length), value=-1).unflatten(1, (chunks, size))
    ends = (torch.arange(1, chunks + 1, device=seq_idx.device) * size).clamp(max=length)
    return numbers, seq_idx[:, ends - 1]


@answering
def chunk_scan(
    B: Tensor,
    C: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    prev_states: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """Return the outputs `(batch, length, heads, dim)`, given the states before each chunk.

    Args:
        B, C, x, dt, dA_cumsum: as for `chunk_state`.
        prev_states: `(batch, chunks, heads, dim, dstate)`.
        D: `(heads,)` or `(heads, dim)`.
        z: like x.
    """
    floating("chunk_scan", B=B, C=C, x=x, dt=dt, dA_cumsum=dA_cumsum, prev_states=prev_states, D=D, z=z)
    _check_chunks("chunk_scan", x, dt, dA_cumsum, B=B, C=C)
    _shaped("chunk_scan", "prev_states", prev_states, (x.shape[0], dt.shape[2], *x.shape[2:], B.shape[3]))
    _shaped("chunk_scan", "z", z, x.shape)
    compute, (chunks, size), heads, length = upcast(x), dt.shape[2:], x.shape[2], x.shape[1]
    b, c, u = (_in_chunks(t, chunks, size, heads, compute) for t in (B, C, x))
    sums = dA_cumsum.to(compute)
    between = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    seen = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    weights = torch.exp(between.masked_fill(~seen, -math.inf)) * torch.einsum("bclhn,bcshn->bhcls", c, b)
    y = torch.einsum("bhcls,bhcs,bcshp->bclhp", weights, dt.to(compute), u)
    since = torch.exp(sums).permute(0, 2, 3, 1).unsqueeze(-1)
    y = y + torch.einsum("bclhn,bchpn->bclhp", c, prev_states.to(compute)) * since
    out = y.flatten(1, 2)[:, :length]
    if D is not None:
        out = out + (D if D.dim() == 2 else D.unsqueeze(1)).to(compute) * x
    return (out if z is None else out * silu(z.to(compute))).to(x.dtype)
