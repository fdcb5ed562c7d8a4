"""The Mamba-2 mixers of mamba_ssm, with the originals' constructors, parameters and caches, over our functions.

Projections and norms are modules that are called: what wraps or hooks them takes part. Options for fused kernels are of
no effect.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from mamba_ops.compat.arguments import only
from mamba_ops.compat.causal_conv1d import causal_conv1d_update
from mamba_ops.compat.mamba_ssm.caches import (
    HasCaches,
    Packing,
    Step,
    WithCaches,
    convolve,
    depthwise,
    not_decayed,
    one_token,
    step_sizes,
)
from mamba_ops.compat.mamba_ssm.norms import RMSNormGated
from mamba_ops.compat.mamba_ssm.scans import mamba_chunk_scan_combined, selective_state_update


class _Mamba2(WithCaches):
    """What Mamba2 and Mamba2Simple share: parameters of heads, and the mixer between its projections."""

    d_ssm: int
    ngroups: int
    d_state: int
    nheads: int
    headdim: int
    chunk_size: int
    dt_limit: tuple[float, float]
    norm: nn.Module | None

    def _new_parameters(
        self, d_conv: int, conv_bias: bool, conv_init: float | None, A_init_range: tuple[float, float], d_size: int,
        sizes: tuple[float, float, float], **new: Any,
    ) -> None:  # fmt: skip
        if not 0 < A_init_range[0] <= A_init_range[1]:
            expected = "0 < low <= high"
            raise ValueError(f"{type(self).__name__}: A_init_range: got {A_init_range}, expected {expected}")
        self.conv1d = depthwise(self.d_ssm + 2 * self.ngroups * self.d_state, d_conv, conv_bias, **new)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.act = nn.SiLU()
        self.dt_bias = not_decayed(nn.Parameter(step_sizes(self.nheads, *sizes, **new)))
        rates = torch.empty(self.nheads, dtype=torch.float32, device=new["device"]).uniform_(*A_init_range)
        self.A_log = not_decayed(nn.Parameter(torch.log(rates).to(dtype=new["dtype"])))
        self.D = not_decayed(nn.Parameter(torch.ones(d_size, device=new["device"])))

    def _state_shape(self) -> tuple[int, ...]:
        return self.nheads, self.headdim, self.d_state

    def _parts(self, zxbcdt: Tensor) -> tuple[Tensor, ...]:
        """Return a gated MLP's gate and value (of no channels where there is none), gate, what is convolved, dt."""
        conv_dim = self.conv1d.weight.shape[0]
        mlp = (zxbcdt.shape[-1] - self.d_ssm - conv_dim - self.nheads) // 2
        parts: tuple[Tensor, ...] = zxbcdt.split([mlp, mlp, self.d_ssm, conv_dim, self.nheads], dim=-1)
        return parts

    def _heads(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self.ngroups * self.d_state
        x, B, C = convolved.split([self.d_ssm, size, size], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _skip(self) -> Tensor:
        return self.D if self.D.shape[0] == self.nheads else self.D.view(self.nheads, self.headdim)

    def _finished(self, y: Tensor, z: Tensor, mlp_gate: Tensor, mlp_value: Tensor) -> Tensor:
        """Return what goes to the last projection."""
        y = y.flatten(-2)
        y = y if self.norm is None else self.norm(y, z)
        return torch.cat((silu(mlp_gate) * mlp_value, y), dim=-1) if mlp_gate.shape[-1] else y

    def _mix(
        self,
        zxbcdt: Tensor,
        states: tuple[Tensor, Tensor] | None = None,
        continues: bool = False,
        initial_states: Tensor | None = None,
        *,
        packed: Packing,
    ) -> Tensor:
        mlp_gate, mlp_value, z, mixed, dt = self._parts(zxbcdt)
        conv_state, ssm_state = states or (None, None)
        convolved = convolve(self.conv1d, mixed.transpose(1, 2), conv_state, continues, packed)
        x, B, C = self._heads(convolved.transpose(1, 2))
        if ssm_state is not None and continues:
            initial_states = ssm_state.float()
        of_sequences = packed["cu_seqlens"] is not None
        result: Any = mamba_chunk_scan_combined(
            *(x, dt, -torch.exp(self.A_log.float()), B, C, self.chunk_size),
            D=self._skip(),
            z=z.unflatten(-1, (self.nheads, self.headdim)) if self.norm is None else None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_states=initial_states,
            return_final_states=ssm_state is not None and not of_sequences,
            return_varlen_states=ssm_state is not None and of_sequences,
            **packed,
        )
        if ssm_state is not None:
            with torch.no_grad():
                ssm_state.copy_(result[1])
        return self._finished(only(result), z, mlp_gate, mlp_value)


class Mamba2(_Mamba2):
    """A Mamba-2 mixer with mamba_ssm's constructor, on one rank."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: None = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        if process_group is not None:
            expected = "None; split a layer of mamba_ops.layers with mamba_ops.distributed.tensor_parallel"
            raise ValueError(f"Mamba2: process_group: got a {type(process_group).__name__}, expected {expected}")
        self.d_model, self.d_state, self.d_conv, self.conv_init, self.expand = (
            d_model, d_state, d_conv, conv_init, expand
        )  # fmt: skip
        self.process_group, self.sequence_parallel, self.world_size, self.local_rank = None, sequence_parallel, 1, 0
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.headdim, self.ngroups, self.D_has_hdim = headdim, ngroups, D_has_hdim
        self.nheads = _heads_of(self, self.d_ssm, headdim, ngroups)
        self.rmsnorm, self.norm_before_gate, self.dt_limit = rmsnorm, norm_before_gate, dt_limit
        self.activation, self.chunk_size = "silu", chunk_size
        self.use_mem_eff_path, self.layer_idx = use_mem_eff_path, layer_idx
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **new)
        skips = self.d_ssm if D_has_hdim else self.nheads
        self._new_parameters(d_conv, conv_bias, conv_init, A_init_range, skips, (dt_min, dt_max, dt_init_floor), **new)
        norm: dict[str, Any] = {"eps": 1e-5, "norm_before_gate": norm_before_gate, "group_size": self.d_ssm // ngroups}
        self.norm = RMSNormGated(self.d_ssm, **norm, **new) if rmsnorm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **new)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: HasCaches | None = None,
    ) -> Tensor:
        """Mix `(batch, length, d_model)`, or `(batch * length, d_model)` with `seqlen`, the length.

        Args:
            u: the tokens.
            seqlen: see above.
            seq_idx, cu_seqlens: packed sequences, as for `mamba_chunk_scan_combined`; kept apart by either.
            inference_params: where states are kept, with `cu_seqlens` those of its sequences; a call continues them
                where `seqlen_offset` is above 0.
        """
        rows = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        states, continues = None, self.continues_cache(inference_params)
        if inference_params is not None:
            count = rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            states = self._get_states_from_cache(inference_params, count)
            if continues and rows.shape[1] == 1 and cu_seqlens is None:
                step = self.step(rows, *states)[0]
                return step if seqlen is None else step.flatten(0, 1)
        mixed = self._mix(self.in_proj(rows), states, continues, packed={"seq_idx": seq_idx, "cu_seqlens": cu_seqlens})
        out: Tensor = self.out_proj(mixed)
        return out if seqlen is None else out.flatten(0, 1)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Step:
        """Mix the next token of every row, `(batch, 1, d_model)`; both states are changed in place."""
        zxbcdt = self.in_proj(one_token(self, hidden_states))
        mlp_gate, mlp_value, z, mixed, dt = self._parts(zxbcdt)
        mixed = causal_conv1d_update(mixed, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        x, B, C = self._heads(mixed)
        of_heads, A = (self.nheads, self.headdim), -torch.exp(self.A_log.float())
        skip = self._skip()
        gate = z.unflatten(-1, of_heads) if self.norm is None else None
        dt_min, dt_max = self.dt_limit
        if (dt_min, dt_max) != (0.0, math.inf):
            dt = softplus(dt + self.dt_bias.float()).clamp(dt_min, dt_max)
        is_limited = (dt_min, dt_max) != (0.0, math.inf)
        y = selective_state_update(
            *(ssm_state, x, dt.unsqueeze(-1).expand(-1, *of_heads)),
            *(A.view(-1, 1, 1).expand(*of_heads, self.d_state), B, C),
            skip if skip.dim() == 2 else skip.unsqueeze(-1).expand(of_heads),
            z=gate,
            dt_bias=None if is_limited else self.dt_bias.unsqueeze(-1).expand(of_heads),
            dt_softplus=not is_limited,
        )
        return self.out_proj(self._finished(y, z, mlp_gate, mlp_value)).unsqueeze(1), conv_state, ssm_state


def _heads_of(mixer: nn.Module, channels: int, headdim: int, ngroups: int) -> int:
    heads, rest = divmod(channels, headdim) if headdim > 0 and ngroups > 0 else (0, channels)
    if rest or heads % ngroups:
        got, name = f"{channels} channels, heads of {headdim} and {ngroups} groups", type(mixer).__name__
        raise ValueError(f"{name}: headdim: got {got}, expected whole heads, as many in every group")
    return heads


class Mamba2Simple(_Mamba2):
    """A Mamba-2 mixer without caches, with mamba_ssm's constructor; its initial states may be parameters."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        if activation not in ("silu", "swish"):
            raise ValueError(f"Mamba2Simple: activation: got {activation!r}, expected 'silu' or 'swish'")
        self.d_model, self.d_state, self.d_conv, self.conv_init, self.expand = (
            d_model, d_state, d_conv, conv_init, expand
        )  # fmt: skip
        self.d_inner = self.d_ssm = expand * d_model
        self.headdim, self.ngroups, self.dt_limit, self.activation = headdim, ngroups, dt_limit, activation
        self.nheads = _heads_of(self, self.d_inner, headdim, ngroups)
        self.learnable_init_states, self.chunk_size = learnable_init_states, chunk_size
        self.use_mem_eff_path, self.layer_idx = use_mem_eff_path, layer_idx
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **new)
        if learnable_init_states:
            self.init_states = not_decayed(nn.Parameter(torch.zeros(self.nheads, headdim, d_state, **new)))
        sizes = (dt_min, dt_max, dt_init_floor)
        self._new_parameters(d_conv, conv_bias, conv_init, A_init_range, self.nheads, sizes, **new)
        self.norm = RMSNormGated(self.d_inner, eps=1e-5, norm_before_gate=False, **new)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **new)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Mix `(batch, length, d_model)`; `seq_idx` as for `mamba_chunk_scan_combined`."""
        states = self.init_states.expand(u.shape[0], -1, -1, -1) if self.learnable_init_states else None
        out: Tensor = self.out_proj(
            self._mix(self.in_proj(u), initial_states=states, packed={"seq_idx": seq_idx, "cu_seqlens": None})
        )
        return out
