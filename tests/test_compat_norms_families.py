"""use_mamba_ops and the RMS norms of every family: which are one call of the op, and what models compute with these."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("triton", reason="the kernel is Triton's")

import mamba_ops
from mamba_ops.compat.transformers import cache_of, use_mamba_ops
from mamba_ops.compat.transformers_norms import bound_form
from tests.transformers_models import ALL_MODELS, EVERY_MODEL, MODELS, VOCABULARY, new_model

ONE_PLUS = "it multiplies by 1 + weight, which is no argument of rms_norm"
NORMS: dict[str, tuple[dict[str, int], set[str]]] = {  # how many are one call; which classes keep their code
    "mamba": ({"MambaRMSNorm": 3}, set()),
    "falcon_mamba": ({"FalconMambaRMSNorm": 3, "FalconMambaWeightlessRMSNorm": 6}, set()),
    "jamba": ({"JambaRMSNorm": 8}, set()),
    "mamba2": ({"Mamba2RMSNorm": 3, "MambaRMSNormGated": 2}, set()),
    "qwen3_next": ({"Qwen3NextRMSNormGated": 1}, {"Qwen3NextRMSNorm"}),
    "qwen3_5": ({"Qwen3_5RMSNormGated": 1}, {"Qwen3_5RMSNorm"}),
    "olmo_hybrid": ({"OlmoHybridRMSNorm": 7, "OlmoHybridRMSNormGated": 1}, set()),
    "zamba": ({"ZambaRMSNorm": 8}, set()),
    "zamba2": ({"Zamba2RMSNorm": 5, "Zamba2RMSNormGated": 2}, set()),
    "bamba": ({"BambaRMSNorm": 5, "BambaRMSNormGated": 1}, set()),
    "falcon_h1": ({"FalconH1RMSNorm": 5}, set()),
    "granitemoehybrid": ({"GraniteMoeHybridRMSNorm": 5, "GraniteMoeHybridRMSNormGated": 1}, set()),
    "nemotron_h": ({"NemotronHRMSNorm": 3, "NemotronHRMSNormGated": 1}, set()),
    "qwen3_5_moe": ({"Qwen3_5MoeRMSNormGated": 1}, {"Qwen3_5MoeRMSNorm"}),
    "lfm2": ({"Lfm2RMSNorm": 7}, set()),
    "kimi_linear": ({"KimiLinearRMSNorm": 6, "KimiLinearRMSNormGated": 1}, set()),
    "lfm2_moe": ({"Lfm2MoeRMSNorm": 7}, set()),
    "lfm3": ({"Lfm3RMSNorm": 11}, set()),
    "bailing_hybrid": ({"BailingHybridRMSNorm": 6, "BailingHybridRMSNormGated": 1}, set()),
    "inkling": ({"InklingRMSNorm": 10}, set()),
    "inkling2": ({"Inkling2RMSNorm": 8, "Inkling2UnweightedRMSNorm": 6}, set()),
    "glm5_next": (
        {
            "Glm5NextRMSNorm": 5,
            "Glm5NextTextRMSNorm": 7,
            "Glm5NextTextRMSNormGated": 1,
            "Glm5NextTextUnweightedRMSNorm": 4,
        },
        set(),
    ),
    "qwen4_exp": ({"Qwen4ExpTextRMSNormGated": 1}, {"Qwen4ExpTextRMSNorm"}),
}
NAMES = [n if n in MODELS else pytest.param(n, marks=pytest.mark.slow) for n in ALL_MODELS]
FORCED = {"rms_norm": "triton"}

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_family_has_its_row() -> None:
    assert set(NORMS) == set(EVERY_MODEL)


def is_norm(module: nn.Module) -> bool:
    return "RMSNorm" in type(module).__name__


def test_which_norms_are_one_call(name: str) -> None:
    """And none that is not in the table: all that have the name are in one of its two columns."""
    model = new_model(name, "cpu")
    own = {type(module): type(module).forward for module in model.modules()}
    with use_mamba_ops(model) as binding:
        found = {kind.rpartition(".")[2]: count for kind, count in binding.norms.items()}
        others = {part.rpartition(".")[2] for part, why in binding.not_bound.items() if why == ONE_PLUS}
        count, left = NORMS[name]
        if name == "nemotron_h" and "Zamba2RMSNormGated" in found:  # in Transformers 5.17, imported from there
            count = {"NemotronHRMSNorm": 3, "Zamba2RMSNormGated": 1}
        assert (found, others) == (count, left)
        assert found.keys() | others == {type(m).__name__ for m in model.modules() if is_norm(m)}
        changed = {
            kind.__name__ for kind, forward in own.items() if kind.forward is not forward and "Norm" in str(kind)
        }
        assert changed == found.keys()
        assert all(f"{kind} is one call of rms_norm in eager" in str(binding) for kind in binding.norms)
    assert {type(module): type(module).forward for module in model.modules()} == own


def spread(model: nn.Module) -> None:
    """Give norms weights that are not all alike."""
    for module in model.modules():
        if is_norm(module):
            for parameter in module.parameters(recurse=False):
                parameter += torch.randn_like(parameter) * 0.3


def readings(model: Any, tokens: Tensor) -> list[Tensor]:
    """Logits of a prompt, of a cached one and two tokens after it, and of one with padding at its left."""
    out = model(tokens[:, :-2], use_cache=True)
    found = [model(tokens, use_cache=False).logits, out.logits]
    for token in tokens[:, -2:].split(1, dim=1):
        out = model(token.contiguous(), **cache_of(out), use_cache=True)
        found.append(out.logits)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    found.append(model(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()])
    return found


def test_logits_are_those_of_stock_but_for_rounding(name: str, device: torch.device) -> None:
    """Each call of a norm is one call of the op."""
    model, tokens = new_model(name, device), torch.randint(3, VOCABULARY, (2, 11), device=device)
    spread(model)
    stock, calls = readings(model, tokens), []
    hooks = [m.register_forward_hook(lambda m, *_: calls.append(m)) for m in model.modules() if is_norm(m)]
    with use_mamba_ops(model), mamba_ops.use_backend(**FORCED):
        with mamba_ops.record_selections() as record:
            ours = readings(model, tokens)
        expected = sum(bound_form(module) is not None for module in calls)
    ran = [selection.backend for selection in record if selection.op == "mamba_ops::rms_norm"]
    assert ran == ["triton"] * expected
    assert expected > 0
    for of_ours, of_stock in zip(ours, stock, strict=True):
        torch.testing.assert_close(of_ours, of_stock, rtol=1e-5, atol=1e-5)
    for hook in hooks:
        hook.remove()


def test_outputs_have_the_dtypes_and_strides_of_stock(name: str, device: torch.device) -> None:
    """Whichever dtypes are mixed, also where hidden states are turned around."""
    model = new_model(name, device)
    spread(model)
    with use_mamba_ops(model):
        norms = {(type(m), bound_form(m)): m for m in model.modules() if bound_form(m) is not None}
        for (_, form), norm in norms.items():
            weight = getattr(norm, "weight", None)
            size = 24 if weight is None else weight.shape[0]
            for of_x in (torch.bfloat16, torch.float32):
                for of_weight in (torch.bfloat16, torch.float32):
                    norm.to(of_weight)
                    for x in (
                        torch.randn(2, 3, size, device=device),
                        torch.randn(3, 2, size, device=device).transpose(0, 1),
                        torch.randn(2, size, 3, device=device).mT,
                        torch.randn(2, 3, 2 * size, device=device)[..., size:],
                        torch.randn(1, 1, 2 * size, device=device)[..., size:],
                    ):
                        given = [x.to(of_x)] + [torch.randn_like(x)] * form.takes(True)
                        same = form.dtype != "alike" or of_x == of_weight
                        assert_like_stock(norm, given, 1 if same else 0)
            if form.takes(True) and form.takes(False):
                assert_like_stock(norm, [torch.randn(2, 3, size, device=device)], 1)


def assert_like_stock(norm: nn.Module, given: list[Tensor], count: int) -> None:
    with mamba_ops.use_backend(rms_norm="torch"):
        stock = norm(*given)
    with mamba_ops.use_backend(**FORCED), mamba_ops.record_selections() as record:
        ours = norm(*given)
    assert len(record) == count
    assert (ours.dtype, ours.shape, ours.stride()) == (stock.dtype, stock.shape, stock.stride())
    bound = 0.03 if torch.bfloat16 in (ours.dtype, given[0].dtype) else 1e-5
    torch.testing.assert_close(ours, stock, rtol=bound, atol=bound)


def test_a_gated_norm_by_groups_of_which_the_number_is_given(device: torch.device) -> None:
    """Falcon-H1's, which its models have by a setting."""
    if "falcon_h1" not in ALL_MODELS:
        pytest.skip("needs a newer Transformers")
    tokens = torch.randint(3, VOCABULARY, (2, 11), device=device)
    for first in (False, True):
        model = new_model("falcon_h1", device, mamba_rms_norm=True, mamba_norm_before_gate=first)
        spread(model)
        stock = readings(model, tokens)
        token = torch.randn(2, 1, 64, device=device)
        # Transformers 5.17 drops the axis of a single token: no such norm
        if model.model.layers[0].mamba.norm(token, token).shape != token.shape:
            continue
        with use_mamba_ops(model) as binding, mamba_ops.use_backend(**FORCED):
            assert {kind.rpartition(".")[2] for kind in binding.norms} == {"FalconH1RMSNorm", "FalconH1RMSNormGated"}
            form = bound_form(model.model.layers[0].mamba.norm)
            assert form is not None
            assert (form.groups, form.norm_before_gate) == (2, first)
            for of_ours, of_stock in zip(readings(model, tokens), stock, strict=True):
                torch.testing.assert_close(of_ours, of_stock, rtol=1e-5, atol=1e-5)
