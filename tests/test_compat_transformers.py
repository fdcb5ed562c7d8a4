"""compat.transformers: Transformers' own Mamba-2 computes the same on our ops, and can be put back."""

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mamba_ops.compat.transformers import cache_of, use_mamba_ops
from mamba_ops.layers import Mamba2
from mamba_ops.testing import assert_within_budget
from tests.ops.common.layers import Mamba2Oracle

modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
PROMPT = 21
# Older ones, 5.17 for one, normalise over all groups at once, unlike mamba_ssm and our fused function.
GROUPS = 2 if "group_size" in inspect.signature(modeling.MambaRMSNormGated.__init__).parameters else 1

pytestmark = pytest.mark.usefixtures("no_grad")


def new_model(device: torch.device, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": GROUPS, "chunk_size": 16}
    config = modeling.Mamba2Config(**{**sizes, "vocab_size": 64, "num_hidden_layers": 3, **changes})
    return modeling.Mamba2ForCausalLM(config).eval().to(device)


@pytest.fixture
def model(device: torch.device) -> Any:
    return new_model(device)


@pytest.fixture
def prompt(device: torch.device) -> Tensor:
    return torch.randint(3, 64, (2, PROMPT), device=device)


def oracle_logits(model: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole model, token by token, in `dtype`."""

    def weight(module: nn.Module) -> Tensor:
        return module.weight.cpu().to(dtype)

    def norm(hidden: Tensor, module: Any) -> Tensor:
        scale = (hidden.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
        return hidden / scale * weight(module)

    hidden = weight(model.backbone.embeddings)[tokens.cpu()]
    for block in model.backbone.layers:
        layer = Mamba2.from_config(model.config)
        layer.load_state_dict(block.mixer.state_dict())
        hidden = hidden + torch.stack([Mamba2Oracle(layer, dtype).read(row) for row in norm(hidden, block.norm)])
    return norm(hidden, model.backbone.norm_f) @ weight(model.lm_head).t()


def read(model: Any, tokens: Tensor, first: int) -> Tensor:
    """Logits of a cached reading: the first tokens at once, the others one by one."""
    out = model(tokens[:, :first], use_cache=True)
    logits = [out.logits]
    for token in tokens[:, first:].split(1, dim=1):
        logits.append(model(token.contiguous(), **cache_of(out), use_cache=True).logits)
    return torch.cat(logits, dim=1)


# -- a model on our ops -----------------------------------------------------------------------------------------------


def test_logits_are_as_near_to_the_truth_as_stock(model: Any, prompt: Tensor) -> None:
    truth, low = (oracle_logits(model, prompt, dtype) for dtype in (torch.float64, torch.float32))
    stock = model(prompt).logits.cpu()
    with use_mamba_ops(model):
        whole, cached = model(prompt, use_cache=False).logits.cpu(), read(model, prompt, 9).cpu()
    slip = 2 * (low - truth).abs().max() + (stock - truth).abs().max()
    for ours in (whole, cached):
        assert_within_budget(ours, truth, low)
        torch.testing.assert_close(ours, stock, rtol=torch.finfo(torch.float32).eps, atol=float(slip))


def test_the_text_is_unchanged(model: Any, prompt: Tensor) -> None:
    padded = torch.ones_like(prompt)
    padded[0, :6] = 0
    for mask in (torch.ones_like(prompt), padded):
        stock = model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False)
        with use_mamba_ops(model):
            ours = model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False)
        assert torch.equal(ours, stock)


def test_caches_are_those_of_stock(model: Any, prompt: Tensor) -> None:
    """After a prefill, a few steps and a second prefill on top; so either can go on with the other's cache."""

    def caches() -> list[Tensor]:
        out = model(prompt[:, :9], use_cache=True)
        for part in (prompt[:, 9:10], prompt[:, 10:11], prompt[:, 11:]):
            out = model(part, **cache_of(out), use_cache=True)
        (cache,) = cache_of(out).values()
        return [t for layer in cache.layers for t in (layer.conv_states[0], layer.recurrent_states[0])]

    stock = caches()
    with use_mamba_ops(model):
        ours = caches()
    torch.testing.assert_close(ours, stock)


def test_bfloat16_is_as_near_to_the_truth_as_stock(device: torch.device, prompt: Tensor) -> None:
    model = new_model(device).bfloat16()
    truth = oracle_logits(model, prompt, torch.float64)
    stock = model(prompt).logits.cpu()
    with use_mamba_ops(model):
        ours = read(model, prompt, 9).cpu()
    assert (ours - truth).abs().max() <= 2 * (stock - truth).abs().max()


# -- what is bound ----------------------------------------------------------------------------------------------------


def in_file() -> dict[str, Any]:
    names = ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan", "mamba2_selective_state_update")
    return {name: getattr(modeling, name) for name in (*names, "mamba2_split_conv1d_scan_combined")}


def test_all_five_are_bound_and_put_back(model: Any, prompt: Tensor) -> None:
    before, stock = in_file(), model(prompt).logits
    binding = use_mamba_ops(model)
    assert {f.__module__ for f in in_file().values()} == {
        "mamba_ops.compat.causal_conv1d",
        "mamba_ops.compat.mamba_ssm.scans",
        "mamba_ops.compat.transformers",  # no kernel for a whole mixer
    }
    assert binding.bound == [f"{modeling.__name__}.{name}" for name in before]
    assert binding.not_bound == {}
    assert f"{modeling.__name__}.causal_conv1d_fn runs on mamba_ops" in str(binding).splitlines()
    binding.undo()
    assert in_file() == before
    assert torch.equal(model(prompt).logits, stock)
    binding.undo()  # a second time it does nothing
    assert in_file() == before


def test_models_of_one_file_share_the_binding(device: torch.device) -> None:
    before = in_file()
    first, second = use_mamba_ops(new_model(device)), use_mamba_ops(torch.compile(new_model(device)))
    bound = in_file()
    first.undo()
    assert in_file() == bound
    second.undo()
    assert in_file() == before
    with pytest.raises(KeyError), use_mamba_ops(new_model(device)):
        raise KeyError
    assert in_file() == before


def test_what_a_file_does_not_have_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    file = ModuleType("planted_modeling_file")
    file.mamba2_chunk_scan = stock = len
    monkeypatch.setitem(sys.modules, file.__name__, file)
    mixer = type("Mixer", (nn.Module,), {"__module__": file.__name__})
    with use_mamba_ops(nn.Sequential(mixer())) as binding:
        assert binding.bound == [f"{file.__name__}.mamba2_chunk_scan"]
        assert len(binding.not_bound) == 4
        assert f"{file.__name__}.causal_conv1d_fn stays as it was: there is none" in str(binding)
    assert vars(file).keys() & in_file().keys() == {"mamba2_chunk_scan"}
    assert file.mamba2_chunk_scan is stock


def test_a_model_of_another_family() -> None:
    with pytest.raises(ValueError, match="got Linear, expected a model of Transformers 5 with Mamba, Mamba-2"):
        use_mamba_ops(nn.Linear(2, 2))


def test_what_is_the_models_own_is_let_through(model: Any, prompt: Tensor) -> None:
    backbone = model.backbone
    stock = backbone(prompt).last_hidden_state
    with use_mamba_ops(model):
        places = torch.arange(PROMPT, device=prompt.device).expand(2, -1)
        ours = backbone(prompt, output_attentions=True, num_items_in_batch=3, position_ids=places, seq_idx=None)
    torch.testing.assert_close(ours.last_hidden_state, stock)


def test_documents_on_top_of_a_cache(model: Any, prompt: Tensor) -> None:
    """The first goes on from the cache; a decode from the last."""
    idx = torch.repeat_interleave(torch.arange(3, device=prompt.device), torch.tensor([9, 5, 7], device=prompt.device))
    with use_mamba_ops(model):
        first = model(prompt[:, :9]).logits
        want = [first, model(prompt[:, 9:14]).logits, model(prompt[:, 14:]).logits]
        out = model(prompt[:, :4], use_cache=True)
        logits = [out.logits]
        out = model(prompt[:, 4:-1], **cache_of(out), use_cache=True, seq_idx=idx[4:-1].expand(2, -1).contiguous())
        logits += [out.logits, model(prompt[:, -1:], **cache_of(out), use_cache=True).logits]
    torch.testing.assert_close(torch.cat(logits, 1), torch.cat(want, 1))
