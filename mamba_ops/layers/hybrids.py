"""Layers that one hybrid model of Transformers has to itself: kinds of Mamba2, Mamba and GatedDeltaNet whose parameters
are named as there. `from_config` of these three returns them.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops.layers.caches import ConvAndState, require_caches
from mamba_ops.layers.checking import check_layer
from mamba_ops.layers.configs import mamba2_sizes, reading_config
from mamba_ops.layers.gated_delta_net import GatedDeltaNet
from mamba_ops.layers.mamba import Mamba
from mamba_ops.layers.mamba2 import Mamba2
from mamba_ops.layers.mixer import RecurrentMixer, Taps, require_silu, side_by_side
from mamba_ops.layers.norms import GatedRMSNorm, upcast
from mamba_ops.ops import (
    causal_conv1d,
    causal_conv1d_update,
    chunk_gated_delta_rule,
    gated_delta_rule_update,
    selective_scan,
    selective_state_update,
)
from mamba_ops.ops._common.narrow import widened
from mamba_ops.ops._common.sequences import DecodeArgs, HasPlan, SequenceArgs
from mamba_ops.ops.gated_delta_rule_update.reference import delta_rule_gates

Device = torch.device | str | None


class FalconH1Mamba2(Mamba2, of_model="falcon_h1"):
    """The Mamba-2 layer of Falcon-H1: what is projected is multiplied, and the norm may be missing.

    Args:
        hidden_size: size of the residual stream.
        in_multiplier: what the input is multiplied with.
        multipliers: what the projected gate, x, B, C and dt are multiplied with.
        with_norm: whether there is a gated norm; without one the output is gated alone.
        norm_before_gate: whether the norm comes first.
        out_bias: whether the output projection has a bias.
        sizes: the other arguments of `Mamba2`; `bias` is that of the input projection.
    """

    is_divisible = False

    def __init__(
        self,
        hidden_size: int,
        *,
        in_multiplier: float = 1.0,
        multipliers: Sequence[float] = (1.0, 1.0, 1.0, 1.0, 1.0),
        with_norm: bool = True,
        norm_before_gate: bool = False,
        out_bias: bool = False,
        **sizes: Any,
    ) -> None:
        super().__init__(hidden_size, **sizes)
        if len(multipliers) != 5:
            expected = "5: of gate, x, B, C and dt"
            raise ValueError(f"FalconH1Mamba2: multipliers: got {len(multipliers)}, expected {expected}")
        like = self.in_proj.weight
        new: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        gate, _, dt = self.projected
        parts = [gate, *self.convolved, dt]
        self.in_proj = ScaledLinear(
            hidden_size, parts, in_multiplier, multipliers, bias=self.in_proj.bias is not None, **new
        )
        if with_norm:
            self.norm.norm_before_gate = norm_before_gate
        else:
            self.norm = Gate()  # type: ignore[assignment]
        self.out_proj = nn.Linear(gate, hidden_size, bias=out_bias, **new)

    @classmethod
    def from_config(cls, config: Any, *, device: Device = None, dtype: torch.dtype | None = None) -> "FalconH1Mamba2":
        """Return the layer that a `FalconH1Config` describes, with new parameters.

        Raises:
            ValueError: the config has another activation than silu, or is none of these.
        """
        with reading_config("FalconH1Mamba2", "Transformers' FalconH1Config"):
            own = {
                "in_multiplier": config.ssm_in_multiplier,
                "multipliers": config.ssm_multipliers,
                "with_norm": config.mamba_rms_norm,
                "norm_before_gate": config.mamba_norm_before_gate,
                "out_bias": config.projectors_bias,
            }
        activation, sizes = mamba2_sizes(config, with_multipliers=True)
        require_silu("FalconH1Mamba2", activation)
        return cls(**sizes, **own, device=device, dtype=dtype)


class ScaledLinear(nn.Linear):
    """A projection whose input, and the parts of whose output, are multiplied with numbers that are no parameters."""

    scale: Tensor

    def __init__(
        self, size: int, parts: Sequence[int], in_multiplier: float, multipliers: Sequence[float], **new: Any
    ) -> None:
        super().__init__(size, sum(parts), **new)
        self.in_multiplier = in_multiplier
        weight = self.weight
        scale = torch.cat([weight.new_full((n,), number) for n, number in zip(parts, multipliers, strict=True)])
        self.register_buffer("scale", scale.detach(), persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project `(..., size)`."""
        return super().forward(hidden_states * self.in_multiplier) * self.scale


class Gate(nn.Module):
    """x * silu(gate), in the place of a gated norm."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Gate `x`."""
        return (upcast(x) * functional.silu(upcast(gate))).to(x.dtype)


class ZambaMamba(Mamba, of_model="zamba"):
    """The Mamba-1 layer of Zamba: heads of channels, each with B, C and steps from its own channels.

    Args:
        hidden_size: size of the residual stream.
        heads: how many there are.
        d_inner, dstate, dt_rank, d_conv, bias, conv_bias, device, dtype: as for `Mamba`.
    """

    takes_plans = False
    is_divisible = False

    def __init__(
        self,
        hidden_size: int,
        *,
        heads: int,
        d_inner: int,
        dstate: int = 16,
        dt_rank: int,
        d_conv: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        RecurrentMixer.__init__(self, hidden_size)
        sizes = {"hidden_size": hidden_size, "heads": heads, "d_inner": d_inner, "dstate": dstate, "dt_rank": dt_rank}
        check_layer("ZambaMamba", sizes=sizes, d_conv=d_conv, numbers={}, dtypes={"dtype": dtype}, device=device)
        if d_inner % heads:
            raise ValueError(f"ZambaMamba: heads: got {heads}, expected a divisor of the {d_inner} channels")
        self.d_inner, self.dstate, self.dt_rank, self.norms, self.eps = d_inner, dstate, dt_rank, None, 0.0
        self.heads, dim = heads, d_inner // heads
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(hidden_size, 2 * d_inner, bias=bias, **new)
        self.conv1d = Taps(d_inner, d_inner, d_conv, groups=d_inner, bias=conv_bias, **new)
        self.x_proj_weight = nn.Parameter(torch.empty(heads, dt_rank + 2 * dstate, dim, **new))
        self.dt_proj_weight = nn.Parameter(torch.empty(heads, dim, dt_rank, **new))
        self.dt_proj_bias = nn.Parameter(torch.empty(heads, dim, **new))
        self.A_log = nn.Parameter(torch.empty(heads, dim, dstate, **new))
        self.D = nn.Parameter(torch.empty(heads, dim, **new))
        self.out_proj = nn.Linear(d_inner, hidden_size, bias=bias, **new)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: Any, *, device: Device = None, dtype: torch.dtype | None = None) -> "ZambaMamba":
        """Return the layer that a `ZambaConfig` describes, with new parameters.

        Raises:
            ValueError: the config has another activation than silu, or is none of these.
        """
        with reading_config("ZambaMamba", "Transformers' ZambaConfig"):
            activation = config.hidden_mamba_act
            sizes: dict[str, Any] = {
                "heads": config.n_mamba_heads,
                "d_inner": config.mamba_expand * config.hidden_size,
                "dstate": config.mamba_d_state,
                "dt_rank": config.mamba_dt_rank,
                "d_conv": config.mamba_d_conv,
                "bias": config.mamba_proj_bias,
                "conv_bias": config.mamba_conv_bias,
            }
        require_silu("ZambaMamba", activation)
        return cls(config.hidden_size, **sizes, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw them as `Mamba` does, each head its own."""
        self.A_log.copy_(torch.arange(1, self.dstate + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        nn.init.uniform_(
            self.x_proj_weight, -(self.x_proj_weight.shape[2] ** -0.5), self.x_proj_weight.shape[2] ** -0.5
        )
        nn.init.uniform_(self.dt_proj_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        low, high = torch.tensor([1e-3, 1e-1]).log().tolist()
        dt = torch.empty_like(self.dt_proj_bias, dtype=torch.float32).uniform_(low, high).exp()
        self.dt_proj_bias.copy_(dt.expm1().log())  # the inverse of softplus

    def _prefill(self, hidden_states: Tensor, caches: ConvAndState, rows: SequenceArgs) -> Tensor:
        x, z = self._project(hidden_states, caches)
        x = rows.bind(causal_conv1d)(x, *self.conv1d(), conv_state=caches.conv_state)
        dt, dt_bias, B, C = self._steps(x)
        states = widened(caches.ssm_state, caches.state_scale, rows, x)
        y = states.rows.bind(selective_scan)(
            x,
            dt,
            self._A(),
            B,
            C,
            D=self.D.flatten(),
            z=z,
            dt_bias=dt_bias.flatten(),
            dt_softplus=True,
            ssm_state=states.states,
        )
        states.keep()
        return cast(Tensor, self.out_proj(y))

    def _decode(self, hidden_states: Tensor, caches: ConvAndState, rows: DecodeArgs) -> Tensor:
        x, z = self._project(hidden_states, caches)
        x = rows.bind(causal_conv1d_update)(x, caches.conv_state, *self.conv1d())
        dt, dt_bias, B, C = self._steps(x)
        by_head, scale = (self.heads, -1), caches.state_scale
        y = rows.bind(selective_state_update)(
            caches.ssm_state.unflatten(1, by_head),
            x.unflatten(-1, by_head),
            dt.unflatten(-1, by_head),
            self._A().unflatten(0, by_head),
            B,
            C,
            D=self.D,
            z=z.unflatten(-1, by_head),
            dt_bias=dt_bias,
            dt_softplus=True,
            state_scale=None if scale is None else scale.unflatten(1, by_head),
        )
        return cast(Tensor, self.out_proj(y.flatten(-2)))

    def _forward_plan(self, hidden_states: Tensor, caches: ConvAndState, plan: HasPlan) -> Tensor:
        raise self._wrong("plan", "a plan", "None: mamba_mixing has one B, C and step for all channels")

    def _project(self, hidden_states: Tensor, caches: ConvAndState) -> tuple[Tensor, Tensor]:
        """Return what is convolved and the gate, which lie beside each other, channel by channel."""
        x, z = cast(Tensor, self.in_proj(hidden_states)).unflatten(-1, (self.d_inner, 2)).unbind(-1)
        require_caches(type(self).__name__, x, caches, self._kinds())
        return x, z

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return step sizes, the bias that they lack, and B and C by head."""
        projected = torch.einsum("...hp,hop->...ho", x.unflatten(-1, (self.heads, -1)), self.x_proj_weight)
        dt, B, C = projected.split([self.dt_rank, self.dstate, self.dstate], dim=-1)
        return torch.einsum("...hr,hpr->...hp", dt, self.dt_proj_weight).flatten(-2), self.dt_proj_bias, B, C

    def _A(self) -> Tensor:
        return -upcast(self.A_log).exp().flatten(0, 1)


class OlmoGatedDeltaNet(GatedDeltaNet, of_model="olmo_hybrid"):
    """The gated delta net of OLMo-Hybrid: a projection for each of its inputs, and beta up to 2 on demand.

    Args:
        hidden_size: size of the residual stream.
        num_k_heads, num_v_heads, head_k_dim, head_v_dim, d_conv: as for `GatedDeltaNet`.
        allow_neg_eigval: whether beta is doubled, so that the state may turn its sign.
        eps: of the gated norm.
        device, dtype: of the parameters.
    """

    is_divisible = False

    def __init__(
        self,
        hidden_size: int,
        *,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int = 128,
        head_v_dim: int = 128,
        d_conv: int = 4,
        allow_neg_eigval: bool = True,
        eps: float = 1e-5,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        RecurrentMixer.__init__(self, hidden_size)
        self._set_sizes(num_k_heads, num_v_heads, head_k_dim, head_v_dim, d_conv, eps, device, dtype)
        self.interleaved, self.allow_neg_eigval = False, allow_neg_eigval
        self.takes_plans = not allow_neg_eigval
        keys, _, values = self.convolved
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = sum(self.convolved)
        sizes = {"q": keys, "k": keys, "v": values, "a": num_v_heads, "b": num_v_heads, "g": values}
        for name, size in sizes.items():
            setattr(self, f"{name}_proj", nn.Linear(hidden_size, size, bias=False, **new))
        self.conv1d = Taps(dim, dim, d_conv, groups=dim, bias=False, **new)
        self.dt_bias = nn.Parameter(torch.empty(num_v_heads, **new))
        self.A_log = nn.Parameter(torch.empty(num_v_heads, **new))
        self.o_norm = GatedRMSNorm(head_v_dim, eps=eps, norm_before_gate=True, **new)
        self.o_proj = nn.Linear(values, hidden_size, bias=False, **new)
        self.reset_parameters()

    @property
    def out_proj(self) -> nn.Linear:  # type: ignore[override]
        """The last projection, by the name that it has in other layers."""
        return self.o_proj

    @classmethod
    def from_config(
        cls, config: Any, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> "OlmoGatedDeltaNet":
        """Return the layer that an `OlmoHybridConfig` describes, with new parameters.

        Raises:
            ValueError: the config has another activation than silu, or is none of these.
        """
        with reading_config("OlmoGatedDeltaNet", "Transformers' OlmoHybridConfig"):
            activation = config.hidden_act
            sizes: dict[str, Any] = {
                "num_k_heads": config.linear_num_key_heads,
                "num_v_heads": config.linear_num_value_heads,
                "head_k_dim": config.linear_key_head_dim,
                "head_v_dim": config.linear_value_head_dim,
                "d_conv": config.linear_conv_kernel_dim,
                "allow_neg_eigval": config.linear_allow_neg_eigval,
            }
        require_silu("OlmoGatedDeltaNet", activation)
        return cls(config.hidden_size, **sizes, device=device, dtype=dtype)

    def _prefill(self, hidden_states: Tensor, caches: ConvAndState, rows: SequenceArgs) -> Tensor:
        mixed, z, b, a = self._project(hidden_states, caches)
        q, k, v = self._split(rows.bind(causal_conv1d)(mixed, *self.conv1d(), conv_state=caches.conv_state))
        states = widened(caches.ssm_state, caches.state_scale, rows, v)
        prefill = states.rows.bind(chunk_gated_delta_rule)
        y = prefill(q, k, v, *self._gates(a, b), ssm_state=states.states, qk_l2norm=True)
        states.keep()
        return self._output(y, z)

    def _forward_plan(self, hidden_states: Tensor, caches: ConvAndState, plan: HasPlan) -> Tensor:
        if self.allow_neg_eigval:
            raise self._wrong("plan", "a plan with allow_neg_eigval", "None: the mixing op does not double beta")
        qkvz = self._projected(hidden_states, "qkvg")
        z = qkvz.new_empty(hidden_states.shape[0], self.num_v_heads, self.head_v_dim)
        ba = self._projected(hidden_states, "ba")
        return self._output(self.mix(qkvz, ba, *caches[:2], plan, z=z, state_scale=caches.state_scale), z)

    def _decode(self, hidden_states: Tensor, caches: ConvAndState, rows: DecodeArgs) -> Tensor:
        mixed, z, b, a = self._project(hidden_states, caches)
        q, k, v = self._split(rows.bind(causal_conv1d_update)(mixed, caches.conv_state, *self.conv1d()))
        g, beta = self._gates(a, b)
        y = rows.bind(gated_delta_rule_update)(
            caches.ssm_state, q, k, v, g=g, beta=beta, qk_l2norm=True, state_scale=caches.state_scale
        )
        return self._output(y, z)

    def _projected(self, hidden_states: Tensor, names: str) -> Tensor:
        return side_by_side(hidden_states, *(getattr(self, f"{name}_proj") for name in names))

    def _gates(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        g, beta = delta_rule_gates(a, b, self.A_log, self.dt_bias)
        return g, 2 * beta if self.allow_neg_eigval else beta

    def _project(self, hidden_states: Tensor, caches: ConvAndState) -> tuple[Tensor, ...]:
        """Return what is convolved, gate, b and a; refuse caches that the op after the convolution would refuse."""
        mixed = self._projected(hidden_states, "qkv")
        z, b, a = (getattr(self, f"{name}_proj")(hidden_states) for name in "gba")
        require_caches(type(self).__name__, mixed, caches, self._kinds())
        return mixed, z.unflatten(-1, (self.num_v_heads, self.head_v_dim)), b, a

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        return cast(Tensor, self.o_proj(self.o_norm(y, z).flatten(-2)))
