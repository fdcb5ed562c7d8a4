"""The Mamba-3 mixer of mamba_ssm, with the original's constructor, parameters and caches, over our layer."""

import torch
from torch import Tensor, nn

from mamba_ops import layers
from mamba_ops.compat.mamba_ssm.caches import HasCaches, not_decayed, states_of, step_sizes
from mamba_ops.compat.packing import Packed

States = tuple[Tensor, Tensor, Tensor, Tensor]
"""`(batch, nheads, angles)`, `(batch, nheads, headdim, d_state)`, `(batch, rank, nheads, d_state)`, `(batch, nheads,
headdim)`, with a rank of 1 unless the mixer is MIMO: how far states are turned, the states, the last B and x."""


class Mamba3(layers.Mamba3):
    """A Mamba-3 mixer with mamba_ssm's constructor, with one input and output a head or, MIMO, with `mimo_rank`.

    Options that nothing reads in the original are of no effect here, either.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        chunk_size: int = 64,
        dropout: float = 0.0,
        layer_idx: int | None = None,
        n_layer: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: object,
    ) -> None:
        d_inner = int(expand * d_model)
        if headdim < 1 or d_inner % headdim:
            raise ValueError(f"Mamba3: headdim: got {headdim}, expected a divisor of the {d_inner} channels")
        super().__init__(
            d_model,
            heads=d_inner // headdim,
            head_dim=headdim,
            dstate=d_state,
            groups=ngroups,
            rope_fraction=rope_fraction,
            A_floor=A_floor,
            out_norm=is_outproj_norm,
            is_mimo=is_mimo,
            mimo_rank=mimo_rank,
            chunk_size=chunk_size,
            device=device,
            dtype=dtype,
        )
        self.d_model, self.d_state, self.expand, self.headdim, self.d_inner = d_model, d_state, expand, headdim, d_inner
        self.nheads, self.num_bc_heads, self.num_rope_angles = self.heads, ngroups, self.angles
        self.rotary_dim_divisor, self.split_tensor_size = int(2 / rope_fraction), 2 * self.angles
        self.layer_idx, self.is_outproj_norm = layer_idx, is_outproj_norm
        sizes = step_sizes(self.heads, dt_min, dt_max, dt_init_floor, dtype=torch.float32, device=device)
        self.dt_bias = nn.Parameter(sizes)
        not_decayed(self.dt_bias)
        not_decayed(self.D)

    def forward(  # type: ignore[override]
        self,
        u: Tensor,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: HasCaches | None = None,
    ) -> Tensor:
        """Mix `(batch, length, d_model)`.

        Args:
            u: the tokens.
            seq_idx: int32 or int64 `(batch, length)`: a sequence begins where the number changes; not in a graph.
            cu_seqlens: int32 or int64 `(n + 1,)`, where sequences end; batch is 1 then.
            inference_params: where states are kept, with `cu_seqlens` those of its sequences; a call continues them
                where `seqlen_offset` is above 0.
        """
        packed = Packed("Mamba3", u.shape[:2], seq_idx, cu_seqlens)
        if packed.first is not None:
            expected = "None in a graph; tell of sequences by cu_seqlens"
            raise ValueError(f"Mamba3: seq_idx: got a tensor, expected {expected}")
        flat = packed.flat(u)
        if inference_params is None:
            return self._outside(packed, super().forward(flat, cu_seqlens=packed.cu_seqlens))
        of_last = cu_seqlens is None and packed.cu_seqlens is not None
        continues = inference_params.seqlen_offset > 0
        if continues and of_last:
            expected = "None where states are continued"
            raise ValueError(f"Mamba3: seq_idx: got a tensor, expected {expected}")
        states = self._get_states_from_cache(inference_params, u.shape[0] if of_last else packed.count())
        if continues and u.shape[1] == 1 and not packed.is_packed:
            return self.step(u, *states)[0]
        caches = self._as_caches(states)
        own = self.empty_caches(packed.count(), dtype=caches[2].dtype, state_dtype=caches[1].dtype) if of_last else None
        goes_on = torch.full((packed.count(),), continues, dtype=torch.bool, device=u.device)
        out = super().forward(flat, *(own or caches), cu_seqlens=packed.cu_seqlens, has_initial_state=goes_on)
        if own is not None:
            with torch.no_grad():
                for state, of_all in zip(caches, own, strict=True):
                    state.copy_(packed.last(of_all))
        return self._outside(packed, out)

    def step(  # type: ignore[override]
        self, u: Tensor, angle_state: Tensor, ssm_state: Tensor, k_state: Tensor, v_state: Tensor, **kwargs: object
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Mix the next token of every row, `(batch, d_model)` or `(batch, 1, d_model)`; states are changed in place."""
        if u.dim() == 3 and u.shape[1] != 1:
            got = f"shape {tuple(u.shape)}"
            raise ValueError(f"Mamba3.step: u: got {got}, expected one token a row; forward continues with several")
        states = (angle_state, ssm_state, k_state, v_state)
        token = u.squeeze(1) if u.dim() == 3 else u
        out = super().step(token, *self._as_caches(states))
        return (out.unsqueeze(1) if u.dim() == 3 else out), *states

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        inplace_state: object = None,
        **kwargs: object,
    ) -> States:
        """Return new states of zeros; the last B and x in `dtype`, or that of the weights."""
        weight = self.in_proj.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        angle, ssm, k, v = self.empty_caches(batch_size, dtype=dtype, state_dtype=exact)
        states = angle, ssm, k if self.is_mimo else k.unsqueeze(1), v
        return states if device is None else tuple(state.to(device) for state in states)  # type: ignore[return-value]

    def _get_states_from_cache(
        self, inference_params: HasCaches, batch_size: int, initialize_states: bool = False
    ) -> States:
        angle, ssm, k, v = states_of(self, inference_params, batch_size, initialize_states)
        return angle, ssm, k, v

    @staticmethod
    def _outside(packed: Packed, out: Tensor) -> Tensor:
        """Return the output of rows; zero for tokens of no sequence."""
        out = packed.rows(out)
        return out if packed.outside is None else out.masked_fill(packed.outside.unsqueeze(-1), 0)

    def _as_caches(self, states: States) -> States:
        """Return the states as our layer's caches."""
        angle, ssm, k, v = states
        return angle, ssm, k if self.is_mimo else k.squeeze(1), v
