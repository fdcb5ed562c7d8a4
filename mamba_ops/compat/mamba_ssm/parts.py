"""The functions of mamba_ssm that are parts of a scan, or a scan and what is around it."""

import math
from typing import Any

from torch import Tensor
from torch.nn.functional import linear, softplus

from mamba_ops.compat.arguments import States, flags, floating, numbers, only, upcast, whole
from mamba_ops.compat.causal_conv1d import causal_conv1d_fn
from mamba_ops.compat.mamba_ssm.scans import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_state_update,
)
from mamba_ops.compat.mamba_ssm.selective_scan import selective_scan_fn
from mamba_ops.layers.norms import rms_norm
from mamba_ops.ops._common.decay import limited
from mamba_ops.registry import answering, use_backend


@answering
def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    *,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Run a Mamba-1 mixer from its first projection `xz` on, and return what the mixer returns.

    Differentiable: all tensors.

    Args:
        xz: `(batch, 2 * dim, length)`: what is convolved, and the gate.
        conv1d_weight, conv1d_bias: `(dim, 1, width)` and `(dim,)`.
        x_proj_weight: `(rank + 2 * dstate, dim)`: to the step's low rank, B and C; of B and C without what is given.
        delta_proj_weight: `(dim, rank)`.
        out_proj_weight, out_proj_bias: `(out, dim)` and `(out,)`.
        A: `(dim, dstate)`.
        B, C: None: as projected; else as `selective_scan_fn` takes them.
        D, delta_bias: `(dim,)`.
        B_proj_bias, C_proj_bias: `(dstate,)`, added to what is projected.
        delta_softplus: whether softplus is applied to the step after the bias.
        checkpoint_lvl: of no effect: what backward needs is computed anew.
        b_rms_weight, c_rms_weight, dt_rms_weight: of RMS norms of B and C `(dstate,)`, and of the step `(dim,)`.
        b_c_dt_rms_eps: of these norms.
        seq_idx, cu_seqlens: not in the original. As for `mamba_chunk_scan_combined`.
    """
    name = "mamba_inner_fn"
    convolution = {"conv1d_weight": conv1d_weight, "conv1d_bias": conv1d_bias}
    weights = {
        "x_proj_weight": x_proj_weight,
        "delta_proj_weight": delta_proj_weight,
        "out_proj_weight": out_proj_weight,
    }
    floating(name, xz=xz, **convolution, **weights, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    numbers(name, b_c_dt_rms_eps=b_c_dt_rms_eps)
    flags(name, delta_softplus=delta_softplus)
    if xz.dim() != 3:
        raise ValueError(f"{name}: xz: got shape {tuple(xz.shape)}, expected (batch, 2 * dim, length)")
    rank, dstate = delta_proj_weight.shape[1], A.shape[-1]
    x, z = xz.chunk(2, dim=1)
    packed: dict[str, Any] = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
    x = only(causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu", **packed))
    rows = [rank, dstate if B is None else 0, dstate if C is None else 0]
    if x_proj_weight.shape[0] != sum(rows):
        expected = f"{sum(rows)}: the step's rank, and dstate for each of B and C that is not given"
        raise ValueError(f"{name}: x_proj_weight: got {x_proj_weight.shape[0]} rows, expected {expected}")
    step, own_B, own_C = linear(x.transpose(1, 2), x_proj_weight).split(rows, dim=-1)
    dt = linear(step, delta_proj_weight)
    if dt_rms_weight is not None:
        dt = rms_norm(dt, dt_rms_weight, b_c_dt_rms_eps)
    y = selective_scan_fn(
        x,
        dt.transpose(1, 2),
        A,
        _projected(B, own_B, B_proj_bias, b_rms_weight, b_c_dt_rms_eps),
        _projected(C, own_C, C_proj_bias, c_rms_weight, b_c_dt_rms_eps),
        D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        **packed,
    )
    out: Tensor = linear(only(y).transpose(1, 2), out_proj_weight, out_proj_bias)
    return out


def _projected(given: Tensor | None, own: Tensor, bias: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """Return B or C as `selective_scan_fn` takes it: what was given, or what was projected."""
    if given is not None:
        return given
    own = own if bias is None else own + bias.to(own.dtype)
    return (own if weight is None else rms_norm(own, weight, eps)).transpose(1, 2)


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Do what `mamba_chunk_scan_combined` does without states."""
    options: dict[str, Any] = {"D": D, "z": z, "dt_bias": dt_bias}
    return only(mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, **options, dt_softplus=dt_softplus))


@answering
def ssd_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """Do what `mamba_chunk_scan_combined` does by the recurrence of Mamba-1, so that a head's channels may differ.

    Args:
        x, z: `(batch, length, heads, dim)`.
        dt: `(batch, length, heads)`, or with a last axis of dim.
        A: `(heads,)`, or `(heads * dim, dstate)`.
        B, C: `(batch, length, groups, dstate)`.
        D, dt_bias: `(heads,)` or `(heads, dim)`.
        dt_softplus: whether softplus is applied to dt after the bias.
        dt_limit: the least and the largest dt; the default does not limit it.
    """
    flags("ssd_selective_scan", dt_softplus=dt_softplus)
    heads, dim = x.shape[2:]

    def by_channel(tensor: Tensor | None) -> Tensor | None:
        """Return what is of heads, or of heads and their channels, of `(heads * dim,)`."""
        if tensor is None:
            return None
        return (tensor.unsqueeze(1).expand(heads, dim) if tensor.dim() == 1 else tensor).flatten()

    step = (dt if dt.dim() == 4 else dt.unsqueeze(-1).expand(*dt.shape, dim)).flatten(2)
    rates = A if A.dim() == 2 else A.view(-1, 1, 1).expand(heads, dim, B.shape[-1]).flatten(0, 1)
    bias, is_soft = by_channel(dt_bias), dt_softplus
    if tuple(dt_limit) != (0.0, math.inf):
        step = step.to(upcast(step)) if bias is None else step + bias.to(upcast(step))
        step = limited(softplus(step) if dt_softplus else step, *dt_limit)
        bias, is_soft = None, False
    y = selective_scan_fn(
        x.flatten(2).transpose(1, 2),
        step.transpose(1, 2),
        rates.to(upcast(rates)),
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        by_channel(D),
        z=None if z is None else z.flatten(2).transpose(1, 2),
        delta_bias=bias,
        delta_softplus=is_soft,
    )
    out: Tensor = only(y).transpose(1, 2).unflatten(-1, (heads, dim))
    return out


# -- the references of the original -----------------------------------------------------------------------------------


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | States:
    """Do what `selective_scan_fn` does, on the backend `torch`."""
    flags("selective_scan_ref", delta_softplus=delta_softplus)
    with use_backend("torch"):
        return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Do what `selective_state_update` does, on the backend `torch`."""
    with use_backend("torch"):
        return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


@answering
def mamba_conv1d_scan_ref(
    xBC: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    activation: str | None = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
) -> Tensor:
    """Convolve and scan, on the backend `torch`: a Mamba-2 mixer between its projections, `(batch, length, dim)`.

    Args:
        xBC: `(batch, length, dim + 2 * groups * dstate)`.
        conv1d_weight, conv1d_bias: `(channels, width)`, `(channels,)`.
        z: `(batch, length, dim)`.
        headdim: dim of a head, where neither `z` nor `D` tells.
        ngroups: groups of B and C.
        chunk_size: of no effect.
        dt, A, D, dt_bias, dt_softplus, dt_limit, activation: as for `ssd_selective_scan` and `causal_conv1d_fn`.
    """
    floating("mamba_conv1d_scan_ref", xBC=xBC, dt=dt, D=D, z=z)
    whole("mamba_conv1d_scan_ref", ngroups=ngroups)
    heads = dt.shape[2]
    if z is not None:
        headdim = z.shape[-1] // heads
    elif D is not None and D.dim() == 2:
        headdim = D.shape[1]
    if headdim is None:
        raise ValueError("mamba_conv1d_scan_ref: headdim: got None, expected the size of a head, as D is per head")
    with use_backend("torch"):
        convolved = only(causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation))
        rest = (convolved.shape[1] - heads * headdim) // 2
        x, B, C = convolved.transpose(1, 2).split([heads * headdim, rest, rest], dim=-1)
        groups, of_heads = (ngroups, rest // ngroups), (heads, headdim)
        y = ssd_selective_scan(
            *(x.unflatten(-1, of_heads), dt.to(x.dtype), A, B.unflatten(-1, groups), C.unflatten(-1, groups), D),
            z=None if z is None else z.unflatten(-1, of_heads),
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
        )
    return y.flatten(-2)


def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """Do what `mamba_split_conv1d_scan_combined` does without states, on the backend `torch`."""
    options: dict[str, Any] = {"dt_limit": dt_limit, "activation": activation, "headdim": headdim, "ngroups": ngroups}
    options |= {"rmsnorm_weight": rmsnorm_weight, "rmsnorm_eps": rmsnorm_eps, "norm_before_gate": norm_before_gate}
    options |= {"outproj_weight": outproj_weight, "outproj_bias": outproj_bias}
    with use_backend("torch"):
        return only(
            mamba_split_conv1d_scan_combined(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, **options)
        )
