"""Layers beside the modules of Transformers whose weights they load: the same outputs, prefill and then decode."""

from typing import Any, NamedTuple

import pytest
import torch

from mamba_ops.compat.transformers import cache_keyword, use_mamba_ops
from mamba_ops.layers import GatedDeltaNet, KimiDeltaAttention, Mamba, Mamba2, ShortConv
from mamba_ops.registry import record_selections
from mamba_ops.testing import assert_within_budget
from tests.layers import KINDS, oracles, set_weights

transformers = pytest.importorskip("transformers")
HIDDEN, PROMPT, STEPS = 32, 37, 32


class Model(NamedTuple):
    layer: Any
    file: str
    mixer: str
    config: str
    sizes: dict[str, Any]


MAMBA = {"num_hidden_layers": 1, "state_size": 8, "time_step_rank": 5}
MAMBA2 = {"num_hidden_layers": 1, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 16}
GDN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "num_hidden_layers": 1,
    "layer_types": ["linear_attention"],
}
JAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 5, "num_hidden_layers": 1, "attn_layer_offset": 1}
CONV = {"num_hidden_layers": 1, "layer_types": ["conv"]}
ALL_LINEAR = {"layer_types": ["linear_attention"]}
SSD = {
    "num_hidden_layers": 1,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
}
NEMOTRON = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "layers_block_type": ["linear_attention"],
}
ZAMBA2 = {
    "num_hidden_layers": 1,
    "n_mamba_heads": 8,
    "mamba_d_state": 16,
    "mamba_ngroups": 2,
    "chunk_size": 16,
    "layers_block_type": ["linear_attention"],
}
KDA = {"linear_num_heads": 3, "linear_head_dim": 8, "num_hidden_layers": 1, **ALL_LINEAR}
MODELS = {
    "Mamba": Model(Mamba, "mamba", "MambaMixer", "MambaConfig", MAMBA),
    "Mamba, other biases": Model(
        Mamba, "mamba", "MambaMixer", "MambaConfig", {**MAMBA, "use_bias": True, "use_conv_bias": False}
    ),
    "Falcon-Mamba": Model(Mamba, "falcon_mamba", "FalconMambaMixer", "FalconMambaConfig", MAMBA),
    "Jamba": Model(Mamba, "jamba", "JambaMambaMixer", "JambaConfig", JAMBA),
    "Mamba-2": Model(Mamba2, "mamba2", "Mamba2Mixer", "Mamba2Config", MAMBA2),
    "Mamba-2, other biases": Model(
        Mamba2,
        "mamba2",
        "Mamba2Mixer",
        "Mamba2Config",
        {**MAMBA2, "use_bias": True, "use_conv_bias": False, "n_groups": 1},
    ),
    "Bamba": Model(Mamba2, "bamba", "BambaMixer", "BambaConfig", SSD),
    "GraniteMoeHybrid": Model(
        Mamba2, "granitemoehybrid", "GraniteMoeHybridMambaLayer", "GraniteMoeHybridConfig", {**SSD, **ALL_LINEAR}
    ),
    "Nemotron-H": Model(Mamba2, "nemotron_h", "NemotronHMamba2Mixer", "NemotronHConfig", NEMOTRON),
    "Zamba2": Model(Mamba2, "zamba2", "Zamba2MambaMixer", "Zamba2Config", ZAMBA2),
    "Qwen3-Next": Model(GatedDeltaNet, "qwen3_next", "Qwen3NextGatedDeltaNet", "Qwen3NextConfig", GDN),
    "LFM2": Model(ShortConv, "lfm2", "Lfm2ShortConv", "Lfm2Config", CONV),
    "LFM2, biases": Model(
        ShortConv, "lfm2", "Lfm2ShortConv", "Lfm2Config", {**CONV, "conv_bias": True, "conv_L_cache": 4}
    ),
    "LFM2-MoE": Model(ShortConv, "lfm2_moe", "Lfm2MoeShortConv", "Lfm2MoeConfig", CONV),
    "LFM3": Model(ShortConv, "lfm3", "Lfm3ShortConv", "Lfm3Config", CONV),
    "Kimi-Linear": Model(KimiDeltaAttention, "kimi_linear", "KimiLinearDeltaAttention", "KimiLinearConfig", KDA),
    "Bailing-hybrid": Model(
        KimiDeltaAttention, "bailing_hybrid", "BailingHybridDeltaAttention", "BailingHybridConfig", KDA
    ),
    "GLM-5-next": Model(KimiDeltaAttention, "glm5_next", "Glm5NextTextLinearAttention", "Glm5NextTextConfig", KDA),
    "Qwen3.5": Model(GatedDeltaNet, "qwen3_5", "Qwen3_5GatedDeltaNet", "Qwen3_5TextConfig", GDN),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_module_of_transformers(name: str, device: torch.device) -> None:
    """As near to Transformers' output as their and our distances from the truth allow."""
    model = MODELS[name]
    modeling = pytest.importorskip(f"transformers.models.{model.file}.modeling_{model.file}")
    config = getattr(modeling, model.config)(hidden_size=HIDDEN, **model.sizes)
    if name == "Falcon-Mamba":  # the mixer alone cannot be built: it initialises norms that it does not have yet
        mixer = modeling.FalconMambaModel(config).layers[0].mixer.eval()
    else:
        mixer = getattr(modeling, model.mixer)(config, 0).eval()
    [name] = [name for name, kind in KINDS.items() if kind.layer is model.layer]
    set_weights(mixer, name)
    with torch.no_grad():
        layer = model.layer.from_config(config)
        layer.load_state_dict(mixer.state_dict())
        assert layer.state_dict().keys() == mixer.state_dict().keys()
        mixer, layer = mixer.to(device), layer.to(device)
        hidden = torch.randn(2, PROMPT + STEPS, HIDDEN, device=device)
        truth, low = oracles(KINDS[name].oracle, layer, hidden)["output"]

        cache, caches = transformers.DynamicCache(config=config), layer.empty_caches(2)
        parts = [hidden[:, :PROMPT], *hidden[:, PROMPT:].split(1, dim=1)]
        theirs = torch.cat([mixer(part, **{cache_keyword(mixer): cache}) for part in parts], dim=1).cpu()
        ours = torch.cat([layer(parts[0], *caches), *(layer.step(part, *caches) for part in parts[1:])], dim=1).cpu()
    assert_within_budget(ours, truth, low)
    slip = 2 * (low - truth).abs().max() + (theirs - truth).abs().max()
    torch.testing.assert_close(ours, theirs, rtol=torch.finfo(torch.float32).eps, atol=float(slip))


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.layer is KimiDeltaAttention])
def test_modules_of_transformers_run_on_our_ops(name: str, device: torch.device) -> None:
    """The functions that their files call are found by their names, whatever the file."""
    model = MODELS[name]
    modeling = pytest.importorskip(f"transformers.models.{model.file}.modeling_{model.file}")
    config = getattr(modeling, model.config)(hidden_size=HIDDEN, **model.sizes)
    mixer = getattr(modeling, model.mixer)(config, 0).to(device).eval()
    set_weights(mixer, "kda")
    hidden = torch.randn(2, PROMPT + STEPS, HIDDEN, device=device)
    parts = [hidden[:, :PROMPT], *hidden[:, PROMPT:].split(1, dim=1)]

    def read() -> torch.Tensor:
        cache = transformers.DynamicCache(config=config)
        return torch.cat([mixer(part, **{cache_keyword(mixer): cache}) for part in parts], dim=1)

    with torch.no_grad():
        expected = read()
        with use_mamba_ops(mixer), record_selections() as record:
            torch.testing.assert_close(read(), expected, rtol=1e-4, atol=1e-5)
    used = {selection.op.partition("::")[2] for selection in record}
    assert used == {"causal_conv1d", "causal_conv1d_update", "chunk_kda", "kda_update"}
