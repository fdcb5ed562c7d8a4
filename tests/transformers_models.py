"""Small models of Transformers with random weights, one of each family whose mixers run on our ops."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 64


def _is_there(file: str) -> bool:
    package = importlib.util.find_spec("transformers")
    folders = [] if package is None else package.submodule_search_locations or []
    return any((Path(folder) / "models" / file).is_dir() for folder in folders)


_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48}
_MAMBA = {"state_size": 8, "time_step_rank": 5}
_GDN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
}
_SSD = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 16}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
_LOOP = {"experts_implementation": "eager"}  # a kernel for grouped experts takes no float64
_MODELS = {  # the modeling file, the model, its config and that config's sizes
    "mamba": ("mamba", "MambaForCausalLM", "MambaConfig", _MAMBA),
    "falcon_mamba": ("falcon_mamba", "FalconMambaForCausalLM", "FalconMambaConfig", _MAMBA),
    "jamba": (
        "jamba",
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_ATTENTION,
            "mamba_d_state": 8,
            "mamba_dt_rank": 5,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "num_experts_per_tok": 1,
        },
    ),
    "mamba2": (
        "mamba2",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 16},
    ),
    "qwen3_next": (
        "qwen3_next",
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**_ATTENTION, **_GDN, **_EXPERTS, "mlp_only_layers": [0, 1]},
    ),
    "qwen3_5": ("qwen3_5", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {**_ATTENTION, **_GDN}),
    "olmo_hybrid": ("olmo_hybrid", "OlmoHybridForCausalLM", "OlmoHybridConfig", {**_ATTENTION, **_GDN}),
}
MODELS = tuple(_MODELS)
_MODELS |= {  # further models whose mixers are of those kinds, or have their short convolution alone
    "zamba": (
        "zamba",
        "ZambaForCausalLM",
        "ZambaConfig",
        {
            **_ATTENTION,
            "mamba_d_state": 8,
            "mamba_dt_rank": 5,
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],  # hybrid ones share weights: two at least
        },
    ),
    "zamba2": (
        "zamba2",
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **_ATTENTION,
            "mamba_d_state": 16,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "chunk_size": 16,
            "layers_block_type": ["linear_attention", "hybrid"],
        },
    ),
    "bamba": ("bamba", "BambaForCausalLM", "BambaConfig", {**_ATTENTION, **_SSD, "attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", "FalconH1ForCausalLM", "FalconH1Config", {**_ATTENTION, **_SSD, "mamba_d_ssm": 64}),
    "granitemoehybrid": (
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **_ATTENTION,
            **_SSD,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **_ATTENTION,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "layers_block_type": ["linear_attention", "full_attention"],
        },
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        {
            **_ATTENTION,
            **_GDN,
            **_EXPERTS,
            "num_experts_per_tok": 2,  # gradients of a router that takes one are rounding alone
            "shared_expert_intermediate_size": 16,
            **_LOOP,
        },
    ),
    "lfm2": ("lfm2", "Lfm2ForCausalLM", "Lfm2Config", {**_ATTENTION, "layer_types": ["conv", "full_attention"]}),
    "kimi_linear": (
        "kimi_linear",
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {
            **_ATTENTION,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "dense"],
        },
    ),
}
_TWO_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 2, **_LOOP}
_LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16}
_RELATIVE = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "d_rel": 4,
    "rel_extent": 32,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "unpadded_vocab_size": VOCABULARY,
}
_MODELS |= {
    "lfm2_moe": (
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {
            **_ATTENTION,
            **_TWO_EXPERTS,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "lfm3": (
        "lfm3",
        "Lfm3ForCausalLM",
        "Lfm3Config",
        {**_ATTENTION, "head_dim": 16, "layer_types": ["conv", "full_attention"]},
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        "BailingHybridForCausalLM",
        "BailingHybridConfig",
        {
            **_ATTENTION,
            **_LATENT,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_mtp_layers": 0,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "dense"],
        },
    ),
    "inkling": (
        "inkling",
        "InklingForCausalLM",
        "InklingTextConfig",
        {
            **_RELATIVE,
            "intermediate_size": 48,
            "mlp_layer_types": ["dense", "dense"],
            "logits_mup_width_multiplier": 1.0,
        },
    ),
    "inkling2": (
        "inkling2",
        "Inkling2ForCausalLM",
        "Inkling2TextConfig",
        {
            **_RELATIVE,
            "moe_intermediate_size": 16,
            "n_routed_experts": 2,
            "num_experts_per_tok": 2,
            "n_layers_per_attn_res_block": 1,
            **_LOOP,
        },
    ),
    "glm5_next": (
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        "Glm5NextConfig",
        {
            "text_config": {
                **_COMMON,
                **_ATTENTION,
                **_LATENT,
                "n_routed_experts": 2,
                "num_experts_per_tok": 1,
                "q_lora_rank": 16,
                "index_topk": 32,
                "index_head_dim": 8,
                "index_n_heads": 2,
                "index_kpool": 4,
                "linear_head_dim": 8,
                "linear_num_heads": 2,
                "layer_types": ["linear_attention", "full_attention"],
                "mlp_layer_types": ["dense", "dense"],
                "hc_mult": 2,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
                "projection_intermediate_size": 16,
            },
        },
    ),
    "qwen4_exp": (
        "qwen4_exp",
        "Qwen4ExpForCausalLM",
        "Qwen4ExpTextConfig",
        {
            **_GDN,
            **_TWO_EXPERTS,
            "shared_expert_intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "hc_count": 2,
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 32,
            "indexer_compress_ratio": 4,
        },
    ),
}
EVERY_MODEL = tuple(_MODELS)
ALL_MODELS = tuple(name for name, (file, *_) in _MODELS.items() if _is_there(file))
"""Models that the installed Transformers has: older ones lack the newest."""
WITH_EXPERTS = tuple(name for name, (*_, sizes) in _MODELS.items() if _LOOP.keys() <= sizes.keys())
NOT_PACKED = tuple(name for name in ("inkling2", "glm5_next") if name in ALL_MODELS)
"""Models that refuse packed documents: a part that is Transformers' own does not keep them apart."""
NOT_FLOAT64 = ("inkling2",)
"""Models whose code does not run in float64."""


def new_model(name: str, device: torch.device | str, **changes: Any) -> Any:
    file, model, config, sizes = _MODELS[name]
    modeling = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    return getattr(modeling, model)(getattr(modeling, config)(**{**_COMMON, **sizes, **changes})).eval().to(device)
