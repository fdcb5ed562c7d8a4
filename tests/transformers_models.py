"""Small models of Transformers with random weights, one of each family whose mixers run on our ops."""

import importlib
from typing import Any

import torch

VOCABULARY = 64

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
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
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


def new_model(name: str, device: torch.device | str, **changes: Any) -> Any:
    file, model, config, sizes = _MODELS[name]
    modeling = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    return getattr(modeling, model)(getattr(modeling, config)(**{**_COMMON, **sizes, **changes})).eval().to(device)
