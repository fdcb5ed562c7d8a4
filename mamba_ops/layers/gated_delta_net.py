"""The gated delta net layer. Its parameters are named as in Transformers, so that it loads checkpoints of Qwen3-Next
and Qwen3.5.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from mamba_ops.layers.caches import ConvAndState, require_caches
from mamba_ops.layers.checking import check_layer
from mamba_ops.layers.configs import reading_config
from mamba_ops.layers.mixer import RecurrentMixer, Taps, require_silu, side_by_side
from mamba_ops.layers.norms import GatedRMSNorm
from mamba_ops.ops import (
    causal_conv1d,
    causal_conv1d_update,
    chunk_gated_delta_rule,
    gated_delta_rule_update,
    gdn_mixing,
)
from mamba_ops.ops._common.narrow import widened
from mamba_ops.ops._common.sequences import DecodeArgs, HasPlan, SequenceArgs
from mamba_ops.ops.gated_delta_rule_update.reference import delta_rule_gates
from mamba_ops.ops.gdn_mixing.reference import unpack


class GatedDeltaNet(RecurrentMixer):
    """Mix the tokens of each sequence, `(..., hidden_size)` to the same shape, with the gated delta rule.

    A call reads sequences from their beginning, or continues them from a cache (prefill); `step` reads the next token
    of every sequence (decode). Caches are passed in and changed in place; what is returned is the output.

    Args:
        hidden_size: size of the residual stream.
        num_k_heads, head_k_dim: heads of q and k, and the size of one.
        num_v_heads, head_v_dim: heads of v and of the state, and the size of one; a head of k is used by
            num_v_heads / num_k_heads of them.
        d_conv: width of the convolution, 2 to 8.
        interleaved: True: two projections (`in_proj_qkvz`, `in_proj_ba`), ordered by head of k, then q, k, v, gate and
            b, a (Qwen3-Next). False: four projections (`in_proj_qkv`, `in_proj_z`, `in_proj_b`, `in_proj_a`), each
            ordered by head (Qwen3.5).
        eps: of the gated norm.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int = 128,
        head_v_dim: int = 128,
        d_conv: int = 4,
        interleaved: bool = True,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size)
        self._set_sizes(num_k_heads, num_v_heads, head_k_dim, head_v_dim, d_conv, eps, device, dtype)
        self.interleaved, values = interleaved, self.convolved[-1]

        new: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = sum(self.convolved)
        if interleaved:
            self.in_proj_qkvz = nn.Linear(hidden_size, dim + values, bias=False, **new)
            self.in_proj_ba = nn.Linear(hidden_size, 2 * num_v_heads, bias=False, **new)
        else:
            self.in_proj_qkv = nn.Linear(hidden_size, dim, bias=False, **new)
            self.in_proj_z = nn.Linear(hidden_size, values, bias=False, **new)
            self.in_proj_b = nn.Linear(hidden_size, num_v_heads, bias=False, **new)
            self.in_proj_a = nn.Linear(hidden_size, num_v_heads, bias=False, **new)
        self.conv1d = Taps(dim, dim, d_conv, groups=dim, bias=False, **new)
        self.dt_bias = nn.Parameter(torch.empty(num_v_heads, **new))
        self.A_log = nn.Parameter(torch.empty(num_v_heads, **new))
        self.norm = GatedRMSNorm(head_v_dim, eps=eps, norm_before_gate=True, **new)
        self.out_proj = nn.Linear(values, hidden_size, bias=False, **new)
        self.reset_parameters()

    def _set_sizes(
        self,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        d_conv: int,
        eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Check the arguments of the constructor, and keep those that are sizes."""
        name = type(self).__name__
        sizes = {"hidden_size": self.hidden_size, "num_k_heads": num_k_heads, "num_v_heads": num_v_heads}
        sizes |= {"head_k_dim": head_k_dim, "head_v_dim": head_v_dim}
        dtypes = {"dtype": dtype}
        check_layer(name, sizes=sizes, d_conv=d_conv, numbers={"eps": eps}, dtypes=dtypes, device=device)
        if num_v_heads % num_k_heads:
            raise ValueError(f"{name}: num_k_heads: got {num_k_heads}, expected a divisor of {num_v_heads}")
        self.num_k_heads, self.num_v_heads = num_k_heads, num_v_heads
        self.head_k_dim, self.head_v_dim = head_k_dim, head_v_dim
        keys, values = num_k_heads * head_k_dim, num_v_heads * head_v_dim
        self.convolved = [keys, keys, values]  # q, k and v

    @classmethod
    def from_config(
        cls, config: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "GatedDeltaNet":
        """Return the layer that a config of Transformers describes, with new parameters.

        Args:
            config: a `Qwen3NextConfig` (interleaved), a `Qwen3_5TextConfig` (not) or an `OlmoHybridConfig` (an
                `OlmoGatedDeltaNet`).
            device, dtype: of the parameters.

        Raises:
            ValueError: the config has another activation than silu, or is none of these.
        """
        if (own := cls._own_of(config)) is not None:
            return cast("GatedDeltaNet", own.from_config(config, device=device, dtype=dtype))
        with reading_config("GatedDeltaNet", "Transformers' Qwen3NextConfig or Qwen3_5TextConfig"):
            activation = config.hidden_act
            sizes: dict[str, Any] = {
                "hidden_size": config.hidden_size,
                "num_k_heads": config.linear_num_key_heads,
                "num_v_heads": config.linear_num_value_heads,
                "head_k_dim": config.linear_key_head_dim,
                "head_v_dim": config.linear_value_head_dim,
                "d_conv": config.linear_conv_kernel_dim,
                "interleaved": config.model_type == "qwen3_next",
                "eps": config.rms_norm_eps,
            }
        if config.model_type != "qwen3_next" and not config.model_type.startswith("qwen3_5"):
            expected = "'qwen3_next' or 'qwen3_5...', the models with known projections"
            raise ValueError(f"GatedDeltaNet.from_config: model_type: got {config.model_type!r}, expected {expected}")
        require_silu("GatedDeltaNet", activation)
        return cls(**sizes, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw decay rates A, uniform in 0.01 to 16, and set dt_bias to ones."""
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(0.01, 16).log())
        nn.init.ones_(self.dt_bias)

    def extra_repr(self) -> str:
        """Return what the sub-modules do not show."""
        names = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "interleaved")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _state(self) -> tuple[int, int, int]:
        return self.num_v_heads, self.head_v_dim, self.head_k_dim

    def _prefill(self, hidden_states: Tensor, caches: ConvAndState, rows: SequenceArgs) -> Tensor:
        mixed, z, b, a = self._project(hidden_states, caches)
        q, k, v = self._split(rows.bind(causal_conv1d)(mixed, *self.conv1d(), conv_state=caches.conv_state))
        g, beta = delta_rule_gates(a, b, self.A_log, self.dt_bias)
        states = widened(caches.ssm_state, caches.state_scale, rows, v)
        y = states.rows.bind(chunk_gated_delta_rule)(q, k, v, g, beta, ssm_state=states.states, qk_l2norm=True)
        states.keep()
        return self._output(y, z)

    def mix(
        self,
        qkvz: Tensor,
        ba: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        plan: HasPlan,
        *,
        z: Tensor,
        state_scale: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run `gdn_mixing` with the layer's parameters: all between its projections but the gated norm."""
        return plan.tensors.bind(gdn_mixing)(
            qkvz,
            ba,
            conv_state,
            ssm_state,
            *self.conv1d(),
            self.A_log,
            self.dt_bias,
            num_k_heads=self.num_k_heads,
            num_v_heads=self.num_v_heads,
            head_k_dim=self.head_k_dim,
            head_v_dim=self.head_v_dim,
            interleaved=self.interleaved,
            z=z,
            null_slot=plan.null_slot,
            state_scale=state_scale,
            out=out,
        )

    def _forward_plan(self, hidden_states: Tensor, caches: ConvAndState, plan: HasPlan) -> Tensor:
        if self.interleaved:
            qkvz, ba = self.in_proj_qkvz(hidden_states), self.in_proj_ba(hidden_states)
        else:
            qkvz = side_by_side(hidden_states, self.in_proj_qkv, self.in_proj_z)
            ba = side_by_side(hidden_states, self.in_proj_b, self.in_proj_a)
        z = qkvz.new_empty(hidden_states.shape[0], self.num_v_heads, self.head_v_dim)
        return self._output(self.mix(qkvz, ba, *caches[:2], plan, z=z, state_scale=caches.state_scale), z)

    def _decode(self, hidden_states: Tensor, caches: ConvAndState, rows: DecodeArgs) -> Tensor:
        mixed, z, b, a = self._project(hidden_states, caches)
        q, k, v = self._split(rows.bind(causal_conv1d_update)(mixed, caches.conv_state, *self.conv1d()))
        y = rows.bind(gated_delta_rule_update)(
            caches.ssm_state,
            q,
            k,
            v,
            a=a,
            b=b,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            qk_l2norm=True,
            state_scale=caches.state_scale,
        )
        return self._output(y, z)

    def _project(self, hidden_states: Tensor, caches: ConvAndState) -> tuple[Tensor, ...]:
        """Return what is convolved, gate, b and a; refuse caches that the op after the convolution would refuse."""
        if self.interleaved:
            qkvz, ba = self.in_proj_qkvz(hidden_states), self.in_proj_ba(hidden_states)
            sizes = self.num_k_heads, self.num_v_heads, self.head_k_dim, self.head_v_dim
            mixed, z, b, a = unpack(qkvz, ba, *sizes, self.interleaved)
        else:
            mixed, b, a = (p(hidden_states) for p in (self.in_proj_qkv, self.in_proj_b, self.in_proj_a))
            z = self.in_proj_z(hidden_states).unflatten(-1, (self.num_v_heads, self.head_v_dim))
        require_caches(type(self).__name__, mixed, caches, self._kinds())
        return mixed, z, b, a

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v by head."""
        q, k, v = mixed.split(self.convolved, dim=-1)
        by_key, by_value = (self.num_k_heads, self.head_k_dim), (self.num_v_heads, self.head_v_dim)
        return q.unflatten(-1, by_key), k.unflatten(-1, by_key), v.unflatten(-1, by_value)

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        return cast(Tensor, self.out_proj(self.norm(y, z).flatten(-2)))
