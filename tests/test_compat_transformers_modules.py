"""use_mamba_ops and what users do to modules: hooks, derived classes, copies, threads; and parts it cannot tell."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from mamba_ops.compat.transformers import cache_of, is_bound, use_mamba_ops
from tests.transformers_models import NOT_PACKED, VOCABULARY, new_model

LENGTHS = (7, 2, 12)
DAILY = ("mamba", "mamba2", "qwen3_5")

pytestmark = pytest.mark.usefixtures("no_grad")


def positions(device: torch.device) -> Tensor:
    return torch.cat([torch.arange(n, device=device) for n in LENGTHS])[None]


def tokens(device: torch.device) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, sum(LENGTHS)), device=device)


def alone(model: Any, row: Tensor) -> Tensor:
    return torch.cat([model(part, use_cache=False).logits for part in row.split(LENGTHS, dim=1)], 1)


def hooked(model: nn.Module) -> nn.Module:
    """As hooks of accelerate leave a model that is placed by a map of devices: forwards belong to modules."""
    for module in model.modules():
        module._old_forward = module.forward
        module.forward = lambda *args, module=module, **kwargs: module._old_forward(*args, **kwargs)
    return model


@pytest.mark.parametrize("name", DAILY)
def test_modules_with_a_forward_of_their_own_are_told(name: str, device: torch.device) -> None:
    model, row = hooked(new_model(name, device)), tokens(device)
    before, want, whole = {m: vars(m)["forward"] for m in model.modules()}, alone(model, row), model(row).logits
    with use_mamba_ops(model), use_mamba_ops(model):
        torch.testing.assert_close(model(row, position_ids=positions(device)).logits, want, rtol=1e-4, atol=1e-4)
        first = model(row[:, :9], use_cache=True)
        torch.testing.assert_close(model(row[:, 9:], **cache_of(first)).logits, whole[:, 9:], rtol=1e-4, atol=1e-4)
    assert {m: vars(m)["forward"] for m in model.modules()} == before


def test_a_hook_that_is_taken_away_stays_away(device: torch.device) -> None:
    model, row = hooked(new_model("mamba2", device)), tokens(device)
    want = model(row).logits
    with use_mamba_ops(model):
        for module in model.modules():
            del module.forward, module._old_forward
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(row).logits, want)


def test_accelerates_hooks(device: torch.device) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, row = new_model("jamba", device), tokens(device)
    want = alone(model, row)
    accelerate.cpu_offload(model, execution_device=device)
    with use_mamba_ops(model):
        torch.testing.assert_close(model(row, position_ids=positions(device)).logits, want, rtol=1e-4, atol=1e-4)


def test_derived_classes_are_told(device: torch.device) -> None:
    """FSDP for one derives a class of its own for every module that it shards."""
    model, row = new_model("mamba2", device), tokens(device)
    want = alone(model, row)
    for module in (model, model.backbone, *model.backbone.layers, *(layer.mixer for layer in model.backbone.layers)):
        module.__class__ = type(f"Sharded{type(module).__name__}", (type(module),), {})
    with use_mamba_ops(model):
        assert is_bound(model.backbone.layers[0].mixer)
        torch.testing.assert_close(model(row, position_ids=positions(device)).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_hooked", [False, True])
def test_copies_compute_with_their_own_weights(is_hooked: bool, device: torch.device) -> None:
    model, row = new_model("mamba", device), tokens(device)
    if is_hooked:
        for module in model.modules():
            module.forward = module.forward  # a method, which a copy binds to itself
    with use_mamba_ops(model):
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(row).logits.any()
        assert model(row).logits.any()


def test_a_bound_model_is_pickled(device: torch.device) -> None:
    """And a layer of one that has trained on documents, and was computed once more in backward."""
    model, row = new_model("mamba2", device).train(), tokens(device)
    with use_mamba_ops(model):
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(row, use_cache=False).logits, model(row, use_cache=False).logits)
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        with torch.enable_grad():
            model(row, position_ids=positions(device), use_cache=False).logits.sum().backward()
        layer, hidden = model.backbone.layers[0], torch.randn(1, 5, model.config.hidden_size, device=device)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(hidden), layer(hidden))


def test_threads_bind_at_once(device: torch.device) -> None:
    model, errors = new_model("mamba2", device), []
    row, forward = tokens(device), type(model).forward
    want = model(row).logits

    def work() -> None:
        try:
            for _ in range(20):
                with use_mamba_ops(model):
                    assert is_bound(model)
                    torch.testing.assert_close(model(row).logits, want, rtol=1e-4, atol=1e-4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not is_bound(model)
    assert type(model).forward is forward


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "granitemoehybrid"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_attention_keeps_documents_apart(name: str, use_cache: bool, device: torch.device) -> None:
    """However they are told of, and where the model makes a cache too."""
    model, row = new_model(name, device), tokens(device)
    other = torch.cat((tokens(device)[:, : LENGTHS[0]], row[:, LENGTHS[0] :]), 1)
    ends = torch.tensor((0, *torch.tensor(LENGTHS).cumsum(0)), dtype=torch.int32, device=device)
    idx = torch.repeat_interleave(torch.arange(3, device=device), torch.tensor(LENGTHS, device=device))[None]
    want = alone(model, row)
    with use_mamba_ops(model):
        masked = {"seq_idx": idx, "attention_mask": torch.ones_like(row)}
        for told in ({"position_ids": positions(device)}, {"seq_idx": idx}, {"cu_seq_lens_q": ends}, masked):
            got = model(row, use_cache=use_cache, **told).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert torch.equal(model(other, use_cache=use_cache, **told).logits[:, 7:], got[:, 7:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3_5", "granitemoehybrid"])
def test_padding_beside_documents(name: str, attention: str, device: torch.device) -> None:
    """In a graph too."""
    model, row = new_model(name, device, attn_implementation=attention), tokens(device)
    idx = torch.repeat_interleave(torch.arange(3, device=device), torch.tensor(LENGTHS, device=device))[None]
    padded = torch.cat((torch.zeros_like(row[:, :4]), row), 1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    told = {"seq_idx": torch.cat((idx[:, :1].expand(-1, 4), idx), 1), "attention_mask": mask, "use_cache": False}
    want = alone(model, row)
    torch.compiler.reset()
    with use_mamba_ops(model):
        torch.testing.assert_close(model(padded, **told).logits[:, 4:], want, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(padded, **told).logits[:, 4:], want, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in NOT_PACKED),
        (
            "qwen4_exp",
            {
                "ple_layer_ids": [1],
                "ple_embed_dim": 16,
                "heads_per_ngram": 2,
                "ngram_vocab_size_base": 50,
                "make_ngram_vocab_size_divisible_by": 1,
                "split_ngram_parts": 1,
            },
        ),
    ],
)
def test_parts_that_cannot_keep_documents_apart_refuse_them(
    name: str, changes: dict[str, Any], device: torch.device
) -> None:
    model, row = new_model(name, device, **changes), tokens(device)
    want = model(row, use_cache=False).logits
    with use_mamba_ops(model) as binding:
        part = max(part for part, why in binding.not_bound.items() if "packed documents" in why).rpartition(".")[2]
        torch.testing.assert_close(model(row, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=f"{part}: got packed documents, expected one a row: "):
            model(row, position_ids=positions(device), use_cache=False)
        torch.testing.assert_close(model(row, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "change"), [("mamba", "conv_kernel"), ("qwen3_next", "linear_conv_kernel_dim")])
def test_a_convolution_that_no_op_reads_is_refused_at_once(name: str, change: str, device: torch.device) -> None:
    model = new_model(name, device, **{change: 9})
    with pytest.raises(
        ValueError, match=r"use_mamba_ops: model: got a \w+ with a convolution of width 9, expected a width of 2 to 8"
    ):
        use_mamba_ops(model)
    assert not is_bound(model)
