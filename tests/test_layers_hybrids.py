"""Layers that one hybrid model has to itself, beside its own, in float32: prompts, their parts, and steps."""

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn

from mamba_ops.compat.transformers import cache_keyword
from mamba_ops.distributed.parts import part_of
from mamba_ops.layers import FalconH1Mamba2, GatedDeltaNet, Mamba, Mamba2, OlmoGatedDeltaNet, ZambaMamba
from tests.transformers_models import new_model

transformers = pytest.importorskip("transformers")
LENGTHS = (17, 6, 1, 1, 1)  # of the calls that read 26 tokens

MULTIPLIERS = {"ssm_in_multiplier": 0.7, "ssm_multipliers": [0.9, 1.2, 0.6, 1.4, 0.8]}
CASES: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {  # the model, the layer that is asked, the one that answers
    "Falcon-H1": ("falcon_h1", Mamba2, FalconH1Mamba2, {**MULTIPLIERS, "mamba_rms_norm": True}),
    "Falcon-H1, no norm": ("falcon_h1", Mamba2, FalconH1Mamba2, {**MULTIPLIERS, "mamba_rms_norm": False}),
    "Falcon-H1, biases": (
        "falcon_h1",
        Mamba2,
        FalconH1Mamba2,
        {
            **MULTIPLIERS,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": True,
            "mamba_proj_bias": True,
            "projectors_bias": True,
        },
    ),
    "Zamba": ("zamba", Mamba, ZambaMamba, {"n_mamba_heads": 2}),
    "Zamba, one head": ("zamba", Mamba, ZambaMamba, {"n_mamba_heads": 1, "mamba_proj_bias": True}),
    "OLMo-Hybrid": ("olmo_hybrid", GatedDeltaNet, OlmoGatedDeltaNet, {"linear_allow_neg_eigval": True}),
    "OLMo-Hybrid, positive": ("olmo_hybrid", GatedDeltaNet, OlmoGatedDeltaNet, {"linear_allow_neg_eigval": False}),
}


def mixer_of(name: str, device: torch.device) -> tuple[Any, Any]:
    """Return a model's own recurrent layer, with weights that are not its first ones, and the config."""
    model, _, _, changes = CASES[name]
    torch.manual_seed(0)
    config = copy.deepcopy(new_model(model, "cpu").config)
    for key, value in changes.items():
        setattr(config, key, value)
    modeling: Any = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    prefix = {"falcon_h1": "FalconH1", "zamba": "Zamba", "olmo_hybrid": "OlmoHybrid"}[model]
    layers = getattr(modeling, f"{prefix}Model")(config).layers
    [mixer, *_] = [m for n, m in layers.named_modules() if n.rpartition(".")[2] in ("mamba", "linear_attn")]
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return mixer.to(device).eval(), config


@pytest.mark.parametrize("name", CASES)
def test_equals_the_model_s_own_layer(name: str, device: torch.device) -> None:
    _, asked, answers, _ = CASES[name]
    mixer, config = mixer_of(name, device)
    with torch.no_grad():
        layer = asked.from_config(config, device=device)
        assert type(layer) is answers
        layer.load_state_dict(mixer.state_dict())
        hidden = torch.randn(1, sum(LENGTHS), config.hidden_size, device=device)
        cache, caches = transformers.DynamicCache(config=config), layer.empty_caches(1)
        whole = layer(hidden)
        # token by token after the prompt: not all of them go on with several at once
        read = [hidden[:, : LENGTHS[0]], *hidden[:, LENGTHS[0] :].split(1, dim=1)]
        theirs = [mixer(part, **{cache_keyword(mixer): cache}) for part in read]
        ours = []
        for i, part in enumerate(hidden.split(LENGTHS, dim=1)):
            more = {"has_initial_state": torch.full((1,), i > 0, device=device)}
            ours.append(layer.step(part, *caches) if part.shape[1] == 1 else layer(part, *caches, **more))
    torch.testing.assert_close(torch.cat(ours, 1), torch.cat(theirs, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole, torch.cat(theirs, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Falcon-H1", "Falcon-H1, no norm", "Zamba", "OLMo-Hybrid"])
def test_gradients_equal_the_model_s_own(name: str) -> None:
    _, asked, _, _ = CASES[name]
    mixer, config = mixer_of(name, torch.device("cpu"))
    layer = asked.from_config(config)
    layer.load_state_dict(mixer.state_dict())
    hidden, way = torch.randn(2, 19, config.hidden_size), torch.randn(2, 19, config.hidden_size)

    def gradients(module: nn.Module) -> list[torch.Tensor]:
        own = dict(module.named_parameters())
        return list(torch.autograd.grad((module(hidden) * way).sum(), [own[key] for key in sorted(own)]))

    torch.testing.assert_close(gradients(layer), gradients(mixer), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["Falcon-H1", "Zamba", "OLMo-Hybrid"])
def test_what_the_layers_of_hybrids_cannot_do_is_refused(name: str) -> None:
    mixer, config = mixer_of(name, torch.device("cpu"))
    del mixer
    layer = CASES[name][1].from_config(config)
    with pytest.raises(TypeError, match=f"tensor_parallel: layer: got a {type(layer).__name__}, expected"):
        part_of(layer, 0, 2)
    with pytest.raises(ValueError, match=f"{type(layer).__name__}.from_config: .*expected"):
        type(layer).from_config(transformers.LlamaConfig(hidden_act="silu"))


def test_a_new_layer_of_zamba_has_numbers_everywhere() -> None:
    layer = ZambaMamba(16, heads=2, d_inner=32, dt_rank=3)
    assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
    assert torch.isfinite(layer(torch.randn(1, 5, 16))).all()
    with pytest.raises(ValueError, match="ZambaMamba: heads: got 3, expected a divisor of the 32 channels"):
        ZambaMamba(16, heads=3, d_inner=32, dt_rank=3)
    with pytest.raises(ValueError, match="FalconH1Mamba2: multipliers: got 2, expected 5"):
        FalconH1Mamba2(16, heads=2, head_dim=8, multipliers=(1.0, 2.0))
