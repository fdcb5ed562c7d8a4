"""What stands around the mixers of mamba_ssm: the block with its residual, and the gated MLP."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from mamba_ops.compat.mamba_ssm.norms import RMSNorm, layer_norm_fn


class Block(nn.Module):
    """Add the residual, normalise, mix; then the same with an MLP, where there is one.

    With mamba_ssm's constructor; before 2.0 that knew of no MLP.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            expected = "an nn.LayerNorm or RMSNorm with fused_add_norm"
            raise ValueError(f"Block: norm_cls: got a {type(self.norm).__name__}, expected {expected}")

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None, **mixer_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the last part's output and the residual that it is to be added to.

        Args:
            hidden_states: `(batch, length, dim)`, the output of the block before.
            residual: like it; None: there is none yet.
            inference_params, mixer_kwargs: for the mixer.
        """
        hidden, residual = add_and_normalise(self, self.norm, hidden_states, residual)
        hidden = self.mixer(hidden, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden, residual = add_and_normalise(self, self.norm2, hidden, residual)
            hidden = self.mlp(hidden)
        return hidden, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """Return the mixer's new states."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]


def add_and_normalise(module: Any, norm: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the normalised sum, and the sum, as `fused_add_norm` and `residual_in_fp32` of a module say."""
    if module.fused_add_norm:
        options = {"eps": norm.eps, "is_rms_norm": isinstance(norm, RMSNorm)}
        total = (residual, module.residual_in_fp32)
        both: Any = layer_norm_fn(
            hidden, norm.weight, norm.bias, total[0], prenorm=True, residual_in_fp32=total[1], **options
        )
        return both[0], both[1]
    residual = hidden if residual is None else hidden + residual
    hidden = norm(residual.to(norm.weight.dtype))
    return hidden, residual.float() if module.residual_in_fp32 else residual


class GatedMLP(nn.Module):
    """fc2(y * activation(gate)), y and gate from fc1; with mamba_ssm's constructor."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, **new)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, in_features if out_features is None else out_features, bias=bias, **new)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.fc2(y * self.activation(gate))
        return out
