"""The Mamba-2 layer. Its parameters are named as in mamba_ssm and Transformers, so that it loads their checkpoints."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops.layers.caches import ConvAndState, require_caches
from mamba_ops.layers.checking import check_layer
from mamba_ops.layers.configs import mamba2_sizes
from mamba_ops.layers.mixer import RecurrentMixer, Taps, require_silu
from mamba_ops.layers.norms import GatedRMSNorm, upcast
from mamba_ops.ops import causal_conv1d, causal_conv1d_update, mamba2_mixing, mamba_chunk_scan, selective_state_update
from mamba_ops.ops._common.narrow import widened
from mamba_ops.ops._common.sequences import DecodeArgs, HasPlan, SequenceArgs


class Mamba2(RecurrentMixer):
    """Mix the tokens of each sequence, `(..., hidden_size)` to the same shape, with `heads` state space models.

    A call reads sequences from their beginning, or continues them from a cache (prefill); `step` reads the next token
    of every sequence (decode). Caches are passed in and changed in place; what is returned is the output.

    Args:
        hidden_size: size of the residual stream.
        heads, head_dim: number of state space models, and channels of each.
        dstate: size of the state of a channel.
        groups: how many pairs of B and C there are for all heads; the norm has as many groups of channels.
        d_conv: width of the convolution, 2 to 8.
        chunk_size: tokens per chunk of the scan; it changes speed and rounding, not what is computed.
        dt_min, dt_max: limits of the step size after its softplus, while decoding too.
        eps: of the gated norm.
        bias, conv_bias: whether the two projections, and the convolution, have a bias.
        device, dtype: of the parameters.
        decay_dtype: of A_log, D and dt_bias; None: dtype. For training in bfloat16: float32.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        heads: int,
        head_dim: int = 64,
        dstate: int = 128,
        groups: int = 1,
        d_conv: int = 4,
        chunk_size: int = 256,
        dt_min: float = 0.0,
        dt_max: float = math.inf,
        eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        decay_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size)
        sizes = {"hidden_size": hidden_size, "heads": heads, "head_dim": head_dim, "dstate": dstate}
        sizes |= {"groups": groups, "chunk_size": chunk_size}
        numbers, dtypes = {"dt_min": dt_min, "dt_max": dt_max, "eps": eps}, {"dtype": dtype, "decay_dtype": decay_dtype}
        check_layer("Mamba2", sizes=sizes, d_conv=d_conv, numbers=numbers, dtypes=dtypes, device=device)
        if heads % groups:
            raise ValueError(f"Mamba2: groups: got {groups}, expected a divisor of the {heads} heads")
        self.heads, self.head_dim, self.dstate, self.groups = heads, head_dim, dstate, groups
        self.chunk_size, self.dt_min, self.dt_max = chunk_size, dt_min, dt_max
        d_inner = heads * head_dim
        self.convolved = [d_inner, groups * dstate, groups * dstate]  # x, B and C
        self.projected = [d_inner, sum(self.convolved), heads]  # gate, what is convolved, dt

        new: dict[str, Any] = {"device": device, "dtype": dtype}
        decay: dict[str, Any] = {"device": device, "dtype": dtype if decay_dtype is None else decay_dtype}
        dim = sum(self.convolved)
        self.in_proj = nn.Linear(hidden_size, sum(self.projected), bias=bias, **new)
        self.conv1d = Taps(dim, dim, d_conv, groups=dim, bias=conv_bias, **new)
        self.dt_bias = nn.Parameter(torch.empty(heads, **decay))
        self.A_log = nn.Parameter(torch.empty(heads, **decay))
        self.D = nn.Parameter(torch.empty(heads, **decay))
        self.norm = GatedRMSNorm(d_inner, groups=groups, eps=eps, **new)
        self.out_proj = nn.Linear(d_inner, hidden_size, bias=bias, **new)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls, config: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Mamba2":
        """Return the layer that a config of Transformers describes, with new parameters.

        Args:
            config: of Mamba-2, Bamba, Falcon-H1 (a `FalconH1Mamba2`), GraniteMoeHybrid, Nemotron-H or Zamba2. The chunk
                size is `mamba_chunk_size`, else `chunk_size`, else the layer's default.
            device, dtype: of the parameters.

        Raises:
            ValueError: the config has another activation than silu, is of another family, or lacks an attribute.
        """
        if (own := cls._own_of(config)) is not None:
            return cast("Mamba2", own.from_config(config, device=device, dtype=dtype))
        activation, sizes = mamba2_sizes(config)
        require_silu("Mamba2", activation)
        return cls(**sizes, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A to -1 .. -heads and D to ones, and draw step sizes, log-uniform in 0.001 to 0.1."""
        self.A_log.copy_(torch.arange(1, self.heads + 1).log())
        nn.init.ones_(self.D)
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(dt.expm1().log())  # the inverse of softplus

    def extra_repr(self) -> str:
        """Return what the sub-modules do not show."""
        names = ("heads", "head_dim", "dstate", "groups", "chunk_size", "dt_min", "dt_max")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _state(self) -> tuple[int, int, int]:
        return self.heads, self.head_dim, self.dstate

    def _prefill(self, hidden_states: Tensor, caches: ConvAndState, rows: SequenceArgs) -> Tensor:
        gate, mixed, dt = self._project(hidden_states, caches)
        weight, bias = self.conv1d()
        x, B, C = self._split(rows.bind(causal_conv1d)(mixed, weight, bias, conv_state=caches.conv_state))
        states = widened(caches.ssm_state, caches.state_scale, rows, x)
        y = states.rows.bind(mamba_chunk_scan)(
            x,
            dt,
            self._A(),
            B,
            C,
            self.chunk_size,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_min=self.dt_min,
            dt_max=self.dt_max,
            ssm_state=states.states,
        )
        states.keep()
        return self._output(y, gate)

    def mix(
        self,
        projected: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        plan: HasPlan,
        *,
        state_scale: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run `mamba2_mixing` with the layer's parameters: all between its projections but the gated norm."""
        return plan.tensors.bind(mamba2_mixing)(
            projected,
            conv_state,
            ssm_state,
            *self.conv1d(),
            self._A(),
            self.D,
            self.dt_bias,
            heads=self.heads,
            head_dim=self.head_dim,
            dstate=self.dstate,
            groups=self.groups,
            chunk_size=self.chunk_size,
            dt_min=self.dt_min,
            dt_max=self.dt_max,
            null_slot=plan.null_slot,
            state_scale=state_scale,
            out=out,
        )

    def _forward_plan(self, hidden_states: Tensor, caches: ConvAndState, plan: HasPlan) -> Tensor:
        projected = cast(Tensor, self.in_proj(hidden_states))
        y = self.mix(projected, *caches[:2], plan, state_scale=caches.state_scale)
        return self._output(y, projected[..., : self.projected[0]])

    def _decode(self, hidden_states: Tensor, caches: ConvAndState, rows: DecodeArgs) -> Tensor:
        gate, mixed, dt = self._project(hidden_states, caches)
        weight, bias = self.conv1d()
        x, B, C = self._split(rows.bind(causal_conv1d_update)(mixed, caches.conv_state, weight, bias))
        dt_bias: Tensor | None = self.dt_bias
        if limited := self.dt_min > 0 or self.dt_max < math.inf:  # the update has no limits of its own
            dt, dt_bias = functional.softplus(dt + upcast(self.dt_bias)).clamp(self.dt_min, self.dt_max), None
        y = rows.bind(selective_state_update)(
            caches.ssm_state,
            x,
            dt,
            self._A(),
            B,
            C,
            D=self.D,
            dt_bias=dt_bias,
            dt_softplus=not limited,
            state_scale=caches.state_scale,
        )
        return self._output(y, gate)

    def _project(self, hidden_states: Tensor, caches: ConvAndState) -> tuple[Tensor, ...]:
        """Return gate, what is convolved, and dt; refuse caches that the op after the convolution would refuse."""
        gate, mixed, dt = cast(Tensor, self.in_proj(hidden_states)).split(self.projected, dim=-1)
        require_caches(type(self).__name__, mixed, caches, self._kinds())
        return gate, mixed, dt

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x by head, and B and C by group."""
        x, B, C = mixed.split(self.convolved, dim=-1)
        by_group = (self.groups, self.dstate)
        return x.unflatten(-1, (self.heads, self.head_dim)), B.unflatten(-1, by_group), C.unflatten(-1, by_group)

    def _A(self) -> Tensor:
        return -upcast(self.A_log).exp()

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        return cast(Tensor, self.out_proj(self.norm(y.flatten(-2), gate)))
