"""The Mamba-1 layer. Its parameters are named as in mamba_ssm and Transformers, so that it loads their checkpoints."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops.layers.caches import ConvAndState, require_caches
from mamba_ops.layers.checking import check_layer
from mamba_ops.layers.configs import reading_config
from mamba_ops.layers.mixer import RecurrentMixer, Taps, require_silu
from mamba_ops.layers.norms import RMSNorm, upcast
from mamba_ops.ops import causal_conv1d, causal_conv1d_update, mamba_mixing, selective_scan, selective_state_update
from mamba_ops.ops._common.narrow import widened
from mamba_ops.ops._common.sequences import DecodeArgs, HasPlan, SequenceArgs

NORMS = (None, "weightless", "weighted")


class Mamba(RecurrentMixer):
    """Mix the tokens of each sequence, `(..., hidden_size)` to the same shape, with a state space model per channel.

    A call reads sequences from their beginning, or continues them from a cache (prefill); `step` reads the next token
    of every sequence (decode). Caches are passed in and changed in place; what is returned is the output.

    Args:
        hidden_size: size of the residual stream.
        d_inner: channels; None: twice the hidden size.
        dstate: size of the state of a channel.
        dt_rank: rank of the projection to step sizes; None: a sixteenth of the hidden size, rounded up.
        d_conv: width of the convolution, 2 to 8.
        norms: RMS norms of dt (before its projection), B and C: None, "weightless" (Falcon-Mamba) or "weighted"
            (Jamba).
        eps: of the norms.
        bias, conv_bias: whether the input and output projections, and the convolution, have a bias.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        d_inner: int | None = None,
        dstate: int = 16,
        dt_rank: int | None = None,
        d_conv: int = 4,
        norms: str | None = None,
        eps: float = 1e-6,
        bias: bool = False,
        conv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size)
        if norms not in NORMS:
            raise ValueError(f"Mamba: norms: got {norms!r}, expected None, 'weightless' or 'weighted'")
        sizes = {"hidden_size": hidden_size, "d_inner": d_inner, "dstate": dstate, "dt_rank": dt_rank}
        given = {name: size for name, size in sizes.items() if size is not None or name not in ("d_inner", "dt_rank")}
        dtypes = {"dtype": dtype}
        check_layer("Mamba", sizes=given, d_conv=d_conv, numbers={"eps": eps}, dtypes=dtypes, device=device)
        d_inner = 2 * hidden_size if d_inner is None else d_inner
        dt_rank = -(-hidden_size // 16) if dt_rank is None else dt_rank
        self.d_inner, self.dstate, self.dt_rank, self.norms, self.eps = d_inner, dstate, dt_rank, norms, eps

        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(hidden_size, 2 * d_inner, bias=bias, **new)
        self.conv1d = Taps(d_inner, d_inner, d_conv, groups=d_inner, bias=conv_bias, **new)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * dstate, bias=False, **new)
        self.dt_proj = nn.Linear(dt_rank, d_inner, **new)
        self.A_log = nn.Parameter(torch.empty(d_inner, dstate, **new))
        self.D = nn.Parameter(torch.empty(d_inner, **new))
        if norms is not None:
            weighted = norms == "weighted"
            self.dt_layernorm = RMSNorm(dt_rank, eps=eps, weighted=weighted, **new)
            self.b_layernorm = RMSNorm(dstate, eps=eps, weighted=weighted, **new)
            self.c_layernorm = RMSNorm(dstate, eps=eps, weighted=weighted, **new)
        self.out_proj = nn.Linear(d_inner, hidden_size, bias=bias, **new)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls, config: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Mamba":
        """Return the layer that a config of Transformers describes, with new parameters.

        Args:
            config: a `MambaConfig`, `FalconMambaConfig`, `JambaConfig` or `ZambaConfig` (a `ZambaMamba`).
            device, dtype: of the parameters.

        Raises:
            ValueError: the config has another activation than silu, or is none of these.
        """
        if (own := cls._own_of(config)) is not None:
            return cast("Mamba", own.from_config(config, device=device, dtype=dtype))
        with reading_config("Mamba", "Transformers' MambaConfig, FalconMambaConfig or JambaConfig"):
            activation = config.hidden_act
            sizes: dict[str, Any]
            if hasattr(config, "mamba_d_state"):
                sizes = {
                    "d_inner": config.mamba_expand * config.hidden_size,
                    "dstate": config.mamba_d_state,
                    "dt_rank": config.mamba_dt_rank,
                    "d_conv": config.mamba_d_conv,
                    "norms": "weighted",
                    "eps": config.rms_norm_eps,
                    "bias": config.mamba_proj_bias,
                    "conv_bias": config.mamba_conv_bias,
                }
            else:
                sizes = {
                    "d_inner": config.intermediate_size,
                    "dstate": config.state_size,
                    "dt_rank": int(config.time_step_rank),
                    "d_conv": config.conv_kernel,
                    "bias": config.use_bias,
                    "conv_bias": config.use_conv_bias,
                }
                if hasattr(config, "mixer_rms_eps"):
                    sizes |= {"norms": "weightless", "eps": config.mixer_rms_eps}
        require_silu("Mamba", activation)
        return cls(config.hidden_size, **sizes, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A to -1 .. -dstate and D to ones, and draw step sizes, log-uniform in 0.001 to 0.1."""
        self.A_log.copy_(torch.arange(1, self.dstate + 1).log().expand(self.d_inner, -1))
        nn.init.ones_(self.D)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty_like(self.dt_proj.bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_proj.bias.copy_(dt.expm1().log())  # the inverse of softplus

    def extra_repr(self) -> str:
        """Return what the sub-modules do not show."""
        return f"d_inner={self.d_inner}, dstate={self.dstate}, dt_rank={self.dt_rank}, norms={self.norms!r}"

    def _state(self) -> tuple[int, int]:
        return self.d_inner, self.dstate

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
            D=self.D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=True,
            ssm_state=states.states,
        )
        states.keep()
        return cast(Tensor, self.out_proj(y))

    def _forward_plan(self, hidden_states: Tensor, caches: ConvAndState, plan: HasPlan) -> Tensor:
        if self.checkpoint_map is not None:
            hint = "mamba_mixing projects all channels inside the op; call the layer, or step, without a plan"
            raise ValueError(
                f"Mamba: plan: got a layer whose channels are split over ranks, expected a whole one; {hint}"
            )
        for name in ("x_proj", "dt_proj"):
            if (kind := type(getattr(self, name))) is not nn.Linear:
                got = f"a layer whose {name} is a {kind.__name__}"
                expected = "an nn.Linear: mamba_mixing reads its weight; call the layer, or step, without a plan"
                raise self._wrong("plan", got, expected)
        norms: tuple[Tensor | None, ...] = (None, None, None)
        if self.norms is not None:
            norms = self.dt_layernorm.weight, self.b_layernorm.weight, self.c_layernorm.weight
        y = plan.tensors.bind(mamba_mixing)(
            self.in_proj(hidden_states),
            *caches[:2],
            *self.conv1d(),
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self._A(),
            self.D,
            *norms,
            norm_eps=self.eps,
            null_slot=plan.null_slot,
            state_scale=caches.state_scale,
        )
        return cast(Tensor, self.out_proj(y))

    def _decode(self, hidden_states: Tensor, caches: ConvAndState, rows: DecodeArgs) -> Tensor:
        x, z = self._project(hidden_states, caches)
        x = rows.bind(causal_conv1d_update)(x, caches.conv_state, *self.conv1d())
        dt, dt_bias, B, C = self._steps(x)
        y = rows.bind(selective_state_update)(
            caches.ssm_state,
            x,
            dt,
            self._A(),
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=True,
            state_scale=caches.state_scale,
        )
        return cast(Tensor, self.out_proj(y))

    def _project(self, hidden_states: Tensor, caches: ConvAndState) -> tuple[Tensor, Tensor]:
        """Return what is convolved and the gate; refuse caches that the op after the convolution would refuse."""
        x, z = cast(Tensor, self.in_proj(hidden_states)).chunk(2, dim=-1)
        require_caches(type(self).__name__, x, caches, self._kinds())
        return x, z

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return step sizes, the bias that they lack, B and C."""
        dt, B, C = cast(Tensor, self.x_proj(x)).split([self.dt_rank, self.dstate, self.dstate], dim=-1)
        if self.norms is not None:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        dt, B, C = self.share(dt), self.share(B), self.share(C)
        if type(self.dt_proj) is not nn.Linear:  # an adapter, which adds to the product, or what holds no plain weight
            return self.dt_proj(dt), None, B, C
        return functional.linear(dt, self.dt_proj.weight), self.dt_proj.bias, B, C

    def _A(self) -> Tensor:
        return -upcast(self.A_log).exp()
