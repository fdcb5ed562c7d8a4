"""The Mamba-1 mixer of mamba_ssm, with the original's constructor, parameters and caches, over our functions.

Projections are modules that are called: what wraps or hooks them takes part. Options for fused kernels are of no
effect.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

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
from mamba_ops.compat.mamba_ssm.scans import selective_state_update
from mamba_ops.compat.mamba_ssm.selective_scan import selective_scan_fn


class Mamba(WithCaches):
    """A Mamba-1 mixer with mamba_ssm's constructor."""

    _channels_last = False

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = -(-d_model // 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.activation, self.act = "silu", nn.SiLU()
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **new)
        self.conv1d = depthwise(self.d_inner, d_conv, conv_bias, **new)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **new)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **new)
        spread = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, spread)
        elif dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        else:
            raise ValueError(f"Mamba: dt_init: got {dt_init!r}, expected 'constant' or 'random'")
        with torch.no_grad():
            self.dt_proj.bias.copy_(step_sizes(self.d_inner, dt_min, dt_max, dt_init_floor, **new))
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        rates = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).expand(self.d_inner, -1)
        self.A_log = not_decayed(nn.Parameter(torch.log(rates).contiguous()))
        self.D = not_decayed(nn.Parameter(torch.ones(self.d_inner, device=device)))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **new)

    def _state_shape(self) -> tuple[int, ...]:
        return self.d_inner, self.d_state

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: HasCaches | None = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix `(batch, length, d_model)`.

        Args:
            hidden_states: the tokens.
            inference_params: where states are kept; a call continues them where `seqlen_offset` is above 0.
            seq_idx, cu_seqlens: not in the original. Packed sequences, as for `selective_scan_fn`.
        """
        conv_state = ssm_state = None
        continues = self.continues_cache(inference_params)
        if inference_params is not None:
            count = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            conv_state, ssm_state = self._get_states_from_cache(inference_params, count)
            if continues and hidden_states.shape[1] == 1 and cu_seqlens is None:
                return self.step(hidden_states, conv_state, ssm_state)[0]
        packed: Packing = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        x = convolve(self.conv1d, x, conv_state, continues, packed)
        dt, B, C = self._projected(x.transpose(1, 2))
        tensors = (x, dt.transpose(1, 2), -torch.exp(self.A_log.float()), B.transpose(1, 2), C.transpose(1, 2))
        options: dict[str, Any] = {"delta_bias": self.dt_proj.bias.float(), "delta_softplus": True, "z": z, **packed}
        if ssm_state is None:
            y = only(selective_scan_fn(*tensors, self.D.float(), **options))
        else:
            options["initial_states"] = ssm_state.float() if continues else None
            options["return_last_state" if cu_seqlens is None else "return_varlen_states"] = True
            y, last = selective_scan_fn(*tensors, self.D.float(), **options)
            with torch.no_grad():
                ssm_state.copy_(last)
        out: Tensor = self.out_proj(y.transpose(1, 2))
        return out

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return step sizes without their bias, B and C of `(..., d_inner)`."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return linear(dt, self.dt_proj.weight), B, C

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Step:
        """Mix the next token of every row, `(batch, 1, d_model)`; both states are changed in place."""
        x, z = self.in_proj(one_token(self, hidden_states)).chunk(2, dim=-1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        dt, B, C = self._projected(x)
        A = -torch.exp(self.A_log.float())
        bias = self.dt_proj.bias.float()
        y = selective_state_update(ssm_state, x, dt, A, B, C, self.D.float(), z=z, dt_bias=bias, dt_softplus=True)
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state
