"""The language model of mamba_ssm, with the original's configuration, parameters and checkpoints."""

import copy
import functools
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamba_ops.compat.mamba_ssm.attention import MHA
from mamba_ops.compat.mamba_ssm.blocks import Block, GatedMLP, add_and_normalise
from mamba_ops.compat.mamba_ssm.checkpoints import load_config_hf, load_state_dict_hf
from mamba_ops.compat.mamba_ssm.generation import GenerationMixin
from mamba_ops.compat.mamba_ssm.mamba import Mamba
from mamba_ops.compat.mamba_ssm.mamba2 import Mamba2
from mamba_ops.compat.mamba_ssm.norms import RMSNorm


@dataclass
class MambaConfig:
    """What a model of mamba_ssm is made of; the names and defaults are the original's."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class CausalLMOutput(NamedTuple):
    """What a model returns."""

    logits: Tensor


_MIXERS: dict[str, type[nn.Module]] = {"Mamba1": Mamba, "Mamba2": Mamba2}


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """Return a block: attention where `layer_idx` is in `attn_layer_idx`, else the mixer that `ssm_cfg` names."""
    new: dict[str, Any] = {"device": device, "dtype": dtype}
    mixer: Any
    if layer_idx in (attn_layer_idx or []):
        mixer = functools.partial(MHA, layer_idx=layer_idx, **(attn_cfg or {}), **new)
    else:
        options = copy.deepcopy(ssm_cfg or {})
        kind = options.pop("layer", "Mamba1")
        if kind not in _MIXERS:
            expected = "'Mamba1' or 'Mamba2', which mamba_ops has"
            raise ValueError(f"create_block: ssm_cfg: got layer {kind!r}, expected {expected}")
        mixer = functools.partial(_MIXERS[kind], layer_idx=layer_idx, **options, **new)
    mlp: Any = nn.Identity
    if d_intermediate:
        mlp = functools.partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **new)
    norm = functools.partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **new)
    block = Block(d_model, mixer, mlp, norm_cls=norm, fused_add_norm=fused_add_norm, residual_in_fp32=residual_in_fp32)
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Set biases to zero and embeddings at random; scale projections to the residual by the number of these."""
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, blocks and a last norm; with mamba_ssm's constructor."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **new)
        kinds: dict[str, Any] = {
            "ssm_cfg": ssm_cfg,
            "attn_layer_idx": attn_layer_idx,
            "attn_cfg": attn_cfg,
            "norm_epsilon": norm_epsilon,
            "rms_norm": rms_norm,
            "residual_in_fp32": residual_in_fp32,
            "fused_add_norm": fused_add_norm,
        }
        self.layers = nn.ModuleList(
            create_block(d_model, d_intermediate, layer_idx=i, **kinds, **new) for i in range(n_layer)
        )
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **new)
        residuals = 2 if d_intermediate else 1
        options = {"n_layer": n_layer, **(initializer_cfg or {}), "n_residuals_per_layer": residuals}
        self.apply(functools.partial(_init_weights, **options))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Return new states of all layers, by index."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """Return the hidden states, `(batch, length, d_model)`, of tokens `(batch, length)`."""
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params, **mixer_kwargs)
        return add_and_normalise(self, self.norm_f, hidden, residual)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A `MixerModel` with a head; with mamba_ssm's constructor, state dict and `generate`."""

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        size = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // size) * size
        self.backbone = MixerModel(
            config.d_model,
            config.n_layer,
            config.d_intermediate,
            vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.apply(functools.partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head have the embedding's weight, where the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Return new states of all layers, by index."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Return the logits of tokens `(batch, length)`.

        Args:
            input_ids: the tokens.
            position_ids: of no effect.
            inference_params: an `InferenceParams`, where states are kept.
            num_last_tokens: of how many last tokens; 0: of all.
            mixer_kwargs: for the mixers, `seq_idx` say.
        """
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(logits=self.lm_head(hidden[:, -num_last_tokens:]))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> "MambaLMHeadModel":
        """Return the model of a checkpoint: a folder with `config.json` and weights, or a name on the hub."""
        config = MambaConfig(**load_config_hf(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype))
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `config.json` and `pytorch_model.bin` to a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=4))
