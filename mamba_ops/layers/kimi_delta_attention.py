"""The layer of Kimi Delta Attention. Its parameters are named as in Transformers, so that it loads checkpoints of
Kimi-Linear, Bailing-hybrid and GLM-5-next.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from mamba_ops.layers.caches import ConvAndState, require_caches
from mamba_ops.layers.checking import check_layer
from mamba_ops.layers.configs import reading_config
from mamba_ops.layers.mixer import RecurrentMixer, Taps, require_silu, side_by_side
from mamba_ops.layers.norms import GatedRMSNorm
from mamba_ops.ops import causal_conv1d, causal_conv1d_update, chunk_kda, kda_mixing, kda_update
from mamba_ops.ops._common.delta_rule import check_lower_bound
from mamba_ops.ops._common.delta_rule_update import sigmoid
from mamba_ops.ops._common.narrow import widened
from mamba_ops.ops._common.sequences import DecodeArgs, HasPlan, SequenceArgs
from mamba_ops.ops.kda_update.reference import kda_gate
from mamba_ops.registry.errors import in_call_of


class KimiDeltaAttention(RecurrentMixer):
    """Mix the tokens of each sequence, `(..., hidden_size)` to the same shape, with Kimi Delta Attention.

    A call reads sequences from their beginning, or continues them from a cache (prefill); `step` reads the next token
    of every sequence (decode). Caches are passed in and changed in place; what is returned is the output. The
    convolutions of q, k and v are one, with one cache.

    Args:
        hidden_size: size of the residual stream.
        num_heads, head_dim: heads of q, k, v and of the state, and the size of one.
        d_conv: width of the convolution, 2 to 8.
        low_rank: True: the decays and the gate of the output come from two projections each, with head_dim numbers
            between them (Kimi-Linear, GLM-5-next). False: from one each (Bailing-hybrid).
        lower_bound: below 0: decays are at least exp(lower_bound) (GLM-5-next, Bailing-hybrid). None: there is none.
        flat_rates: whether A_log is `(num_heads,)`, and not `(1, 1, num_heads, 1)` as in Kimi-Linear.
        eps: of the gated norm.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int = 128,
        d_conv: int = 4,
        low_rank: bool = True,
        lower_bound: float | None = None,
        flat_rates: bool = False,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size)
        name = "KimiDeltaAttention"
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "head_dim": head_dim}
        numbers = {"eps": eps} if lower_bound is None else {"eps": eps, "lower_bound": lower_bound}
        check_layer(name, sizes=sizes, d_conv=d_conv, numbers=numbers, dtypes={"dtype": dtype}, device=device)
        try:
            check_lower_bound(lower_bound)
        except ValueError as error:
            raise in_call_of(name, error) from None
        self.num_heads, self.head_dim, self.low_rank = num_heads, head_dim, low_rank
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = num_heads * head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, dim, bias=False, **new) for _ in range(3))
        self.conv1d = Taps(3 * dim, 3 * dim, d_conv, groups=3 * dim, bias=False, **new)
        self.forget_gate = ForgetGate(hidden_size, num_heads, head_dim, low_rank, lower_bound, flat_rates, **new)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False, **new)
        if low_rank:
            self.g_a_proj = nn.Linear(hidden_size, head_dim, bias=False, **new)
            self.g_b_proj = nn.Linear(head_dim, dim, bias=False, **new)
        else:
            self.g_proj = nn.Linear(hidden_size, dim, bias=False, **new)
        self.o_norm = GatedRMSNorm(head_dim, eps=eps, norm_before_gate=True, activation="sigmoid", **new)
        self.o_proj = nn.Linear(dim, hidden_size, bias=False, **new)

    @property
    def out_proj(self) -> nn.Linear:  # type: ignore[override]
        """The last projection, by the name that it has in other layers."""
        return self.o_proj

    @classmethod
    def from_config(
        cls, config: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "KimiDeltaAttention":
        """Return the layer that a config of Transformers describes, with new parameters.

        Args:
            config: a `KimiLinearConfig`, a `BailingHybridConfig` or a `Glm5NextTextConfig`.
            device, dtype: of the parameters.

        Raises:
            ValueError: the config has another activation than silu, or is none of these.
        """
        with reading_config(
            "KimiDeltaAttention", "Transformers' KimiLinearConfig, BailingHybridConfig or Glm5NextTextConfig"
        ):
            activation = config.hidden_act
            sizes: dict[str, Any] = {
                "hidden_size": config.hidden_size,
                "num_heads": config.linear_num_heads,
                "head_dim": config.linear_head_dim,
                "d_conv": config.linear_conv_kernel_dim,
                "eps": config.rms_norm_eps,
            }
            if config.model_type == "bailing_hybrid":
                bound = config.kda_lower_bound if config.kda_safe_gate else None
                sizes |= {"low_rank": False, "lower_bound": bound, "flat_rates": True}
            elif config.model_type.startswith("glm5_next"):
                sizes |= {"lower_bound": config.linear_lower_bound, "flat_rates": True}
            elif config.model_type != "kimi_linear":
                raise AttributeError(f"got the model_type {config.model_type!r}")
        require_silu("KimiDeltaAttention", activation)
        return cls(**sizes, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        """Return what the sub-modules do not show."""
        names = ("num_heads", "head_dim", "low_rank")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _state(self) -> tuple[int, int, int]:
        return self.num_heads, self.head_dim, self.head_dim

    def _prefill(self, hidden_states: Tensor, caches: ConvAndState, rows: SequenceArgs) -> Tensor:
        mixed, a, b, gate = self._project(hidden_states)
        require_caches(type(self).__name__, mixed, caches, self._kinds())
        q, k, v = self._split(rows.bind(causal_conv1d)(mixed, *self.conv1d(), conv_state=caches.conv_state))
        g, beta = self.forget_gate(a), sigmoid(b.to(torch.promote_types(b.dtype, torch.float32)))
        states = widened(caches.ssm_state, caches.state_scale, rows, v)
        y = states.rows.bind(chunk_kda)(q, k, v, g, beta, ssm_state=states.states, qk_l2norm=True)
        states.keep()
        return self._output(y, gate)

    def mix(
        self,
        mixed: Tensor,
        a: Tensor,
        b: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        plan: HasPlan,
        *,
        state_scale: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run `kda_mixing` with the layer's parameters: all between its projections but the gated norm."""
        A_log, dt_bias = self.forget_gate.weights()
        return plan.tensors.bind(kda_mixing)(
            mixed,
            a,
            b,
            conv_state,
            ssm_state,
            *self.conv1d(),
            A_log,
            dt_bias,
            num_k_heads=self.num_heads,
            num_v_heads=self.num_heads,
            head_k_dim=self.head_dim,
            head_v_dim=self.head_dim,
            lower_bound=self.forget_gate.lower_bound,
            null_slot=plan.null_slot,
            state_scale=state_scale,
            out=out,
        )

    def _forward_plan(self, hidden_states: Tensor, caches: ConvAndState, plan: HasPlan) -> Tensor:
        mixed, a, b, gate = self._project(hidden_states)
        return self._output(self.mix(mixed, a, b, *caches[:2], plan, state_scale=caches.state_scale), gate)

    def _decode(self, hidden_states: Tensor, caches: ConvAndState, rows: DecodeArgs) -> Tensor:
        mixed, a, b, gate = self._project(hidden_states)
        require_caches(type(self).__name__, mixed, caches, self._kinds())
        q, k, v = self._split(rows.bind(causal_conv1d_update)(mixed, caches.conv_state, *self.conv1d()))
        A_log, dt_bias = self.forget_gate.weights()
        y = rows.bind(kda_update)(
            caches.ssm_state,
            q,
            k,
            v,
            a=a.unflatten(-1, (self.num_heads, self.head_dim)),
            b=b,
            A_log=A_log,
            dt_bias=dt_bias,
            lower_bound=self.forget_gate.lower_bound,
            qk_l2norm=True,
            state_scale=caches.state_scale,
        )
        return self._output(y, gate)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Return what is convolved, a, b and the gate: all that is made of tokens, which may lie where a cache does."""
        mixed = side_by_side(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        gate = self.g_b_proj(self.g_a_proj(hidden_states)) if self.low_rank else self.g_proj(hidden_states)
        return mixed, self.forget_gate.project(hidden_states), self.b_proj(hidden_states), gate

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v by head."""
        q, k, v = mixed.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return q, k, v

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        gate = gate.unflatten(-1, (self.num_heads, self.head_dim))
        return cast(Tensor, self.o_proj(self.o_norm(y, gate).flatten(-2)))


class ForgetGate(nn.Module):
    """The logs of the decays of every head and channel, `(..., num_heads, head_dim)`, of what it projects tokens to.

    The arguments are those of `KimiDeltaAttention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        low_rank: bool,
        lower_bound: float | None,
        flat_rates: bool,
        **new: Any,
    ) -> None:
        super().__init__()
        self.heads, self.low_rank, self.lower_bound = (num_heads, head_dim), low_rank, lower_bound
        if low_rank:
            self.f_a_proj = nn.Linear(hidden_size, head_dim, bias=False, **new)
            self.f_b_proj = nn.Linear(head_dim, num_heads * head_dim, bias=False, **new)
        else:
            self.f_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False, **new)
        self.dt_bias = nn.Parameter(torch.empty(num_heads * head_dim, **new))
        self.A_log = nn.Parameter(torch.empty((num_heads,) if flat_rates else (1, 1, num_heads, 1), **new))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw rates, uniform in 1 to 16, and step sizes, of which the logs are uniform from 0.001 to 0.1."""
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16).log())
        low, high = torch.tensor([1e-3, 1e-1]).log().tolist()
        step = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(low, high).exp()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, projected: Tensor) -> Tensor:
        """Return the logs, in float32 at least, of what `project` returned."""
        return kda_gate(projected.unflatten(-1, self.heads), *self.weights(), self.lower_bound)

    def project(self, hidden_states: Tensor) -> Tensor:
        """Return what the logs are made of, `(..., num_heads * head_dim)`."""
        raw: Tensor = self.f_b_proj(self.f_a_proj(hidden_states)) if self.low_rank else self.f_proj(hidden_states)
        return raw

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return A_log, `(num_heads,)`, and dt_bias, `(num_heads, head_dim)`, as ops take them."""
        return self.A_log.flatten(), self.dt_bias.unflatten(0, self.heads)
