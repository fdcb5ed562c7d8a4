"""compat.transformers on one small model of every family: what stock computes, on our ops, and put back afterwards."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from mamba_ops.compat.transformers import cache_of, use_mamba_ops
from mamba_ops.registry import record_selections
from tests.transformers_models import ALL_MODELS, MODELS, NOT_FLOAT64, VOCABULARY, new_model

OPS = {
    "mamba": {"causal_conv1d", "causal_conv1d_update", "selective_scan", "selective_state_update"},
    "mamba2": {"causal_conv1d", "causal_conv1d_update", "mamba_chunk_scan", "selective_state_update"},
    "convolution": {"causal_conv1d", "causal_conv1d_update"},
    "kda": {"causal_conv1d", "causal_conv1d_update", "chunk_kda", "kda_update"},
    "gdn": {"causal_conv1d", "causal_conv1d_update", "chunk_gated_delta_rule", "gated_delta_rule_update"},
}
FAMILY = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba", "zamba"), "mamba"),
    **dict.fromkeys(("mamba2", "zamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h"), "mamba2"),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "olmo_hybrid", "qwen3_5_moe", "qwen4_exp"), "gdn"),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3", "inkling", "inkling2"), "convolution"),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid", "glm5_next"), "kda"),
}
NOT_BOUND = {  # Transformers has no such function, or a class has code of its own
    "zamba": {"mamba_inner_fn"},
    "qwen3_next": {"Qwen3NextRMSNorm"},
    "qwen3_5": {"Qwen3_5RMSNorm"},
    "qwen3_5_moe": {"Qwen3_5MoeRMSNorm"},
    "qwen4_exp": {"Qwen4ExpTextRMSNorm"},
    "inkling2": {"Inkling2DynamicShortConvolution"},
    "glm5_next": {"Glm5NextTextModel"},
}

pytestmark = pytest.mark.usefixtures("no_grad")


NAMES = [n if n in MODELS else pytest.param(n, marks=pytest.mark.slow) for n in ALL_MODELS]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def logits(model: Any, tokens: Tensor, first: int) -> Tensor:
    """Of a cached reading: the first tokens at once, the others one by one."""
    out = model(tokens[:, :first], use_cache=True)
    parts = [out.logits]
    for token in tokens[:, first:].split(1, dim=1):
        cache = cache_of(out)
        out = model(token.contiguous(), **cache, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, dim=1).cpu()


@pytest.mark.parametrize("name", [n for n in NAMES if getattr(n, "values", (n,))[0] not in NOT_FLOAT64])
def test_logits_are_as_near_to_the_truth_as_stock(name: str, device: torch.device) -> None:
    """The truth is stock in float64; it computes decays in float32 there too. Stock in float32 is far from that by so
    much on a CPU, and by so much on this device: ours may be by as much as the two, the first counted twice.
    """
    model, tokens = new_model(name, device), torch.randint(3, VOCABULARY, (2, 21), device=device)

    def readings(model: Any) -> tuple[Tensor, Tensor]:
        """With a cache and whole; of Bamba in Transformers 5.23 the two differ, as its cache counts no tokens."""
        at = tokens.to(model.device)
        return logits(model, at, 9), model(at, use_cache=False).logits.cpu()

    stock = readings(model)
    low = readings(model.cpu())
    truth = readings(new_model_like(model.to(device), name, device))
    with use_mamba_ops(model), record_selections() as record:
        ours = readings(model)
    assert {selection.op.split("::")[1] for selection in record} - {"rms_norm"} == OPS[FAMILY[name]]
    for of_ours, of_stock, of_low, true in zip(ours, stock, low, truth, strict=True):
        slip = 2 * (of_low - true).abs().max() + (of_stock - true).abs().max()
        bounds = {"rtol": torch.finfo(torch.float32).eps, "atol": float(slip)}
        torch.testing.assert_close(of_ours, true.to(of_ours.dtype), **bounds)


def new_model_like(model: Any, name: str, device: torch.device) -> Any:
    other = new_model(name, device).double()
    other.load_state_dict(model.state_dict())
    return other


def test_the_text_is_unchanged(name: str, device: torch.device) -> None:
    model, tokens = new_model(name, device), torch.randint(3, VOCABULARY, (2, 9), device=device)
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    stock = model.generate(tokens, **options)
    with use_mamba_ops(model):
        assert torch.equal(model.generate(tokens, **options), stock)


def test_every_function_is_bound_and_put_back(name: str) -> None:
    model = new_model(name, "cpu")
    files = {type(m).__module__ for m in model.modules() if "modeling_" in type(m).__module__}
    before = {file: dict(vars(sys.modules[file])) for file in files}
    with use_mamba_ops(model) as binding:
        assert {n.rpartition(".")[2] for n in binding.not_bound} == NOT_BOUND.get(name, set())
        now = {f"{file}.{n}": (f, before[file][n]) for file in files for n, f in vars(sys.modules[file]).items()}
        changed = {n for n, (f, was) in now.items() if f is not was}
        assert {n for n in changed if not n.endswith("_mask")} == set(binding.bound)
        assert binding.bound
        assert all(now[n][0].__module__.startswith("mamba_ops.compat.") for n in binding.bound)
    assert {file: dict(vars(sys.modules[file])) for file in files} == before
