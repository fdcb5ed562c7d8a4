"""The Mamba-3 layer, with one input and output a head, or several. Its parameters are named as in mamba_ssm."""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops.layers.caches import Cache
from mamba_ops.layers.checking import check_layer
from mamba_ops.layers.mixer import Mixer
from mamba_ops.layers.norms import GatedRMSNorm, RMSNorm, upcast
from mamba_ops.ops import mamba3_chunk_scan, mamba3_mixing, mamba3_state_update
from mamba_ops.ops._common.checking import packed_rows
from mamba_ops.ops._common.sequences import NULL_SLOT, DecodeArgs, HasPlan, SequenceArgs
from mamba_ops.ops._common.values import check_rows
from mamba_ops.registry import answering, bad_argument
from mamba_ops.registry.errors import in_call_of

_MIMO = ("mimo_x", "mimo_z", "mimo_o")


class Mamba3Caches(NamedTuple):
    """The caches of a Mamba-3 layer.

    Attributes:
        angle_state: `(slots, heads, angles)`, how far the state is turned.
        ssm_state: `(slots, heads, head_dim, dstate)`.
        k_state: `(slots, heads, dstate)`, B of the last token, turned. MIMO: `(slots, rank, heads, dstate)`.
        v_state: `(slots, heads, head_dim)`, x of the last token.
    """

    angle_state: Tensor
    ssm_state: Tensor
    k_state: Tensor
    v_state: Tensor


class Mamba3(Mixer[Mamba3Caches]):
    """Mix the tokens of each sequence, `(..., hidden_size)` to the same shape, with Mamba-3: no convolution, a
    trapezoidal rule, and states that turn. Each head has one input and one output (SISO), or several (MIMO).

    A call reads sequences from their beginning, or continues them from caches (prefill); `step` reads the next token
    of every sequence (decode). Caches are passed in and changed in place; what is returned is the output.

    Args:
        hidden_size: size of the residual stream.
        heads, head_dim: number of state space models, and channels of each.
        dstate: size of the state of a channel.
        groups: how many pairs of B and C there are for all heads.
        rope_fraction: the part of dstate that turns: 0.5 or 1.
        A_floor: the least rate.
        out_norm: whether the output is normalised by head, and then gated; else it is gated alone.
        is_mimo, mimo_rank: whether a head has as many inputs and outputs as its rank, and not one.
        chunk_size: tokens per chunk of the scan; it changes speed and rounding, not what is computed.
        eps: of the norms.
        device, dtype: of the parameters.
        decay_dtype: of D, dt_bias, B_bias, C_bias, mimo_x, mimo_z and mimo_o; None: float32, as in mamba_ssm.
    """

    Caches = Mamba3Caches
    mimo_x: nn.Parameter
    mimo_z: nn.Parameter
    mimo_o: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        *,
        heads: int,
        head_dim: int = 64,
        dstate: int = 128,
        groups: int = 1,
        rope_fraction: float = 0.5,
        A_floor: float = 1e-4,
        out_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        chunk_size: int = 64,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        decay_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size)
        sizes = {"hidden_size": hidden_size, "heads": heads, "head_dim": head_dim, "dstate": dstate}
        sizes |= {"groups": groups, "chunk_size": chunk_size, "mimo_rank": mimo_rank}
        numbers, dtypes = {"A_floor": A_floor, "eps": eps}, {"dtype": dtype, "decay_dtype": decay_dtype}
        check_layer("Mamba3", sizes=sizes, numbers=numbers, dtypes=dtypes, device=device)
        if heads % groups:
            raise ValueError(f"Mamba3: groups: got {groups}, expected a divisor of the {heads} heads")
        if rope_fraction not in (0.5, 1):
            raise ValueError(f"Mamba3: rope_fraction: got {rope_fraction!r}, expected 0.5 or 1")
        if A_floor <= 0:
            raise ValueError(f"Mamba3: A_floor: got {A_floor}, expected more than 0")
        if (angles := int(dstate * rope_fraction) // 2) < 1:
            raise ValueError(f"Mamba3: dstate: got {dstate}, expected {2 if rope_fraction == 1 else 4} at least")
        self.heads, self.head_dim, self.dstate, self.groups, self.angles = heads, head_dim, dstate, groups, angles
        self.A_floor, self.chunk_size = A_floor, chunk_size
        self.out_norm, self.is_mimo, self.mimo_rank = out_norm, bool(is_mimo), mimo_rank if is_mimo else 1
        d_inner, bc = heads * head_dim, self.mimo_rank * groups * dstate
        self.projected = [d_inner, d_inner, bc, bc, heads, heads, heads, angles]  # z, x, B, C, dt, A, trap, angles

        new: dict[str, Any] = {"device": device, "dtype": dtype}
        decay: dict[str, Any] = {"device": device, "dtype": torch.float32 if decay_dtype is None else decay_dtype}
        self.in_proj = nn.Linear(hidden_size, sum(self.projected), bias=False, **new)
        self.dt_bias = nn.Parameter(torch.empty(heads, **decay))
        self.B_bias = nn.Parameter(torch.empty(heads, self.mimo_rank, dstate, **decay))
        self.C_bias = nn.Parameter(torch.empty(heads, self.mimo_rank, dstate, **decay))
        self.B_norm = RMSNorm(dstate, eps=eps, **new)
        self.C_norm = RMSNorm(dstate, eps=eps, **new)
        self.D = nn.Parameter(torch.empty(heads, **decay))
        if is_mimo:
            for name in _MIMO:
                self.register_parameter(name, nn.Parameter(torch.empty(heads, mimo_rank, head_dim, **decay)))
        if out_norm:
            self.norm = GatedRMSNorm(d_inner, groups=heads, eps=eps, norm_before_gate=True, **new)
        self.out_proj = nn.Linear(d_inner, hidden_size, bias=False, **new)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set D and the biases of B and C to ones, and draw step sizes, log-uniform in 0.001 to 0.1.

        MIMO: what goes in and comes out is the mean over the rank, and gates are one.
        """
        for parameter in (self.D, self.B_bias, self.C_bias, *((self.mimo_z,) if self.is_mimo else ())):
            nn.init.ones_(parameter)
        for parameter in (self.mimo_x, self.mimo_o) if self.is_mimo else ():
            nn.init.constant_(parameter, 1 / self.mimo_rank)
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(dt.expm1().log())  # the inverse of softplus

    def extra_repr(self) -> str:
        """Return what the sub-modules do not show."""
        names = ("heads", "head_dim", "dstate", "groups", "angles", "is_mimo", "mimo_rank", "chunk_size")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @answering
    def forward(
        self,
        hidden_states: Tensor,
        angle_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        k_state: Tensor | None = None,
        v_state: Tensor | None = None,
        *,
        plan: HasPlan | None = None,
        slots: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        has_initial_state: Tensor | None = None,
        null_slot: int = NULL_SLOT,
    ) -> Tensor:
        """Read sequences and return their output; with caches, store each sequence's last states there.

        With a plan, the tokens are those of an engine's step: some sequences decode, others are prefilled.

        Args:
            hidden_states: `(batch, length, hidden_size)`, or packed `(tokens, hidden_size)` with `cu_seqlens`.
            angle_state, ssm_state, k_state, v_state: caches as `empty_caches` makes them, all or none. Mutated.
            plan: a `mamba_ops.serving.Plan` of packed tokens, in place of the arguments after it. What is returned for
                padding tokens has no meaning.
            slots: int32 or int64 `(>= n,)`: the slot of sequence i in the caches. None: slot i.
            cu_seqlens: int32 or int64 `(n + 1,)`: sequence i is the tokens cu_seqlens[i] up to cu_seqlens[i + 1]. What
                is returned for tokens after the last sequence has no meaning.
            has_initial_state: bool `(n,)`: sequence i continues from its states in the caches. None: none does.
            null_slot: a sequence with this slot, or a negative one, is padding: it is not mixed, no cache is touched.
        """
        rows = SequenceArgs(slots, cu_seqlens, has_initial_state, null_slot)
        return self._read(hidden_states, plan, rows, angle_state, ssm_state, k_state, v_state)

    @answering
    def step(
        self,
        hidden_states: Tensor,
        angle_state: Tensor,
        ssm_state: Tensor,
        k_state: Tensor,
        v_state: Tensor,
        *,
        slots: Tensor | None = None,
        null_slot: int = NULL_SLOT,
    ) -> Tensor:
        """Read the next token of every sequence, advance the caches in place and return the tokens' output.

        Args:
            hidden_states: `(n, hidden_size)`, or the next few tokens of every sequence `(n, length, hidden_size)`.
            angle_state, ssm_state, k_state, v_state, slots, null_slot: as for a call of the layer.
        """
        rows = DecodeArgs(slots, null_slot=null_slot)
        return self._advance(hidden_states, rows, angle_state, ssm_state, k_state, v_state)

    def _like(self) -> Tensor:
        return self.in_proj.weight

    def _kinds(self) -> tuple[Cache, ...]:
        rank = (self.mimo_rank,) if self.is_mimo else ()
        kept = (*rank, self.heads, self.dstate), (self.heads, self.head_dim)
        states = Cache((self.heads, self.angles)), Cache((self.heads, self.head_dim, self.dstate))
        return *states, *(Cache(sizes, of_inputs=True) for sizes in kept)

    def _prefill(self, hidden_states: Tensor, caches: Mamba3Caches, rows: SequenceArgs) -> Tensor:
        z, tokens, options = self.project(hidden_states)
        if all(cache is None for cache in caches):
            self._check_rows(hidden_states, rows)
        call: Any = rows.bind(mamba3_chunk_scan)
        return self._output(call(*tokens, self.chunk_size, **caches._asdict(), **options), z)

    def _check_rows(self, hidden_states: Tensor, rows: SequenceArgs) -> None:
        """Raise the ValueError about rows of a call without caches, by the names that the layer has for its inputs."""
        for name in ("slots", "has_initial_state"):
            if getattr(rows, name) is not None:
                raise self._wrong(name, "a tensor", "None where there are no caches")
        try:
            packed_rows(rows.cu_seqlens)
            if (hidden_states.dim() == 2) != (rows.cu_seqlens is not None):
                expected = "(tokens, hidden_size) with cu_seqlens, (batch, length, hidden_size) without"
                raise bad_argument("hidden_states", got=f"shape {tuple(hidden_states.shape)}", expected=expected)
            if self.mimo_rank > 1 and hidden_states.is_cpu and not torch.compiler.is_compiling():
                check_rows(hidden_states, rows.cu_seqlens)
        except ValueError as error:
            raise in_call_of("Mamba3", error) from None

    def mix(
        self,
        tokens: tuple[Tensor, ...],
        options: dict[str, Any],
        caches: Mamba3Caches,
        plan: HasPlan,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run `mamba3_mixing` with what `project` returned: all between its projections but the norm of the output."""
        call: Any = plan.tensors.bind(mamba3_mixing)
        size = self.chunk_size
        mixed: Tensor = call(*tokens, *caches, chunk_size=size, **options, null_slot=plan.null_slot, out=out)
        return mixed

    def _forward_plan(self, hidden_states: Tensor, caches: Mamba3Caches, plan: HasPlan) -> Tensor:
        z, tokens, options = self.project(hidden_states)
        return self._output(self.mix(tokens, options, caches, plan), z)

    def _decode(self, hidden_states: Tensor, caches: Mamba3Caches, rows: DecodeArgs) -> Tensor:
        z, tokens, options = self.project(hidden_states)
        advance: Any = rows.bind(mamba3_state_update)
        return self._output(advance(*caches, *tokens, **options), z)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Any]]:
        """Return the gate, what the ops take for each token, and their keywords."""
        projected = cast(Tensor, self.in_proj(hidden_states)).split(self.projected, dim=-1)
        z, x, B, C, dt, A, trap, angles = projected
        z, x = (tensor.unflatten(-1, (self.heads, self.head_dim)) for tensor in (z, x))
        by_group = (self.mimo_rank, self.groups, self.dstate) if self.is_mimo else (self.groups, self.dstate)
        B, C = self.B_norm(B.unflatten(-1, by_group)), self.C_norm(C.unflatten(-1, by_group))
        rates = -functional.softplus(upcast(A)).clamp(min=self.A_floor)
        steps = functional.softplus(dt + upcast(self.dt_bias))  # dt is promoted while it is added: no copy of it
        options: dict[str, Any] = {"B_bias": self.B_bias, "C_bias": self.C_bias, "D": self.D}
        if self.is_mimo:
            options["mimo_x"] = self.mimo_x
            options |= {} if self.out_norm else {"z": z, "mimo_z": self.mimo_z, "mimo_o": self.mimo_o}
        else:
            options |= {name: options[name].squeeze(1) for name in ("B_bias", "C_bias")}
            options |= {} if self.out_norm else {"z": z}
        return z, (x, steps, rates, trap, angles, B, C), options

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        if self.out_norm and self.is_mimo:
            weights, gate = (upcast(weight).transpose(0, 1) for weight in (self.mimo_o, self.mimo_z))
            gated = self.norm(upcast(y).flatten(-2), (upcast(z).unsqueeze(-3) * gate).flatten(-2))
            y = (gated.unflatten(-1, (self.heads, self.head_dim)) * weights).sum(-3).to(y.dtype)
            return cast(Tensor, self.out_proj(y.flatten(-2)))
        y = y.flatten(-2)
        return cast(Tensor, self.out_proj(self.norm(y, z.flatten(-2)) if self.out_norm else y))
