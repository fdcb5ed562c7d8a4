"""Attention of bound models over packed documents: document by document, wherever a mask need not be filled."""

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers")

from mamba_ops.compat import transformers_attention
from mamba_ops.compat.transformers import use_mamba_ops
from mamba_ops.compat.transformers_attention import ByDocument, by_document
from mamba_ops.compat.transformers_mixing import hearing, telling
from tests.transformers_models import ALL_MODELS, VOCABULARY, new_model

ENDS = (0, 7, 9, 21)
CPU = torch.device("cpu")


def filled(ends: Tensor, batch: int, length: int) -> Tensor:
    """The mask by its definition: a token sees those before it in its own row and document."""
    number = torch.bucketize(torch.arange(batch * length), ends[1:].long(), right=True).view(batch, length)
    is_same = number.unsqueeze(2) == number.unsqueeze(1)
    return (is_same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


def mask_of(*ends: int, batch: int = 1, length: int = 21) -> tuple[ByDocument, Tensor]:
    """A mask, and what it stands for."""
    given = torch.tensor(ends)
    return by_document(given, batch, length), filled(given, batch, length)


def qkv(batch: int = 1, length: int = 21, dim: int = 8) -> list[Tensor]:
    return [torch.randn(batch, length, 2, dim).transpose(1, 2).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize(
    ("ends", "batch"),
    [
        pytest.param(ENDS, 1, id="documents"),
        pytest.param((0, 7, 7, 7, 21), 1, id="empty ones"),
        pytest.param((0, 5, 9), 1, id="tokens after the last"),
        pytest.param((0, 4, 21, 30, 42), 2, id="rows"),
        pytest.param((0,), 1, id="none"),
    ],
)
def test_attention_is_that_of_the_filled_mask(ends: tuple[int, ...], batch: int) -> None:
    mask, whole = mask_of(*ends, batch=batch)
    tensors = qkv(batch)
    weight = torch.randn(batch, 2, 21, 8)
    results = []
    for each in (mask, whole):
        out = F.scaled_dot_product_attention(*tensors, attn_mask=each, scale=0.3)
        results.append([out, *torch.autograd.grad((out * weight).sum(), tensors)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert mask._filled is None
    assert torch.equal(mask.filled(), whole)


@pytest.mark.parametrize("ends", [(0, 7, 99), (0, -5, 21), (3, 40, 2, 21), (0, 2**40, 21)])
def test_ends_outside_of_the_rows_are_kept_within(ends: tuple[int, ...]) -> None:
    mask, _ = mask_of(*ends)
    kept = mask._ends.tolist()
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (0, 21)
    assert F.scaled_dot_product_attention(*qkv(), attn_mask=mask).isfinite().all()


def test_documents_of_a_kernel_see_what_one_alone_does() -> None:
    """Bit for bit: nothing of a document's neighbours is in its numbers."""
    mask, _ = mask_of(*ENDS)
    tensors = [t.detach() for t in qkv()]
    packed = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    for begin, end in itertools.pairwise(ENDS):
        alone = F.scaled_dot_product_attention(*(t[:, :, begin:end] for t in tensors), is_causal=True)
        torch.testing.assert_close(packed[:, :, begin:end], alone, rtol=0, atol=0)


def test_what_else_asks_for_numbers_gets_the_mask() -> None:
    mask, whole = mask_of(*ENDS)
    assert (mask.shape, mask.dtype, mask.device, mask.ndim) == (whole.shape, torch.bool, CPU, 4)
    assert (mask.get_device(), torch.is_floating_point(mask), mask.is_complex()) == (-1, False, False)
    assert mask._filled is None
    for function in (
        torch.clone,
        Tensor.detach,
        lambda m: m & True,
        lambda m: m[:, :, :, :5],
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: torch.cat((m, m)),
        lambda m: m.to(torch.float32),
        copy.deepcopy,
    ):
        mask, _ = mask_of(*ENDS)
        got, want = function(mask), function(whole)
        assert type(got) is Tensor
        assert torch.equal(got, want)
        assert mask._filled is not None
    assert mask.filled() is mask.filled()


def test_what_is_written_into_the_mask_holds() -> None:
    (mask, whole), tensors = mask_of(*ENDS), qkv()
    mask[..., :9] = False
    whole[..., :9] = False
    got, want = (F.scaled_dot_product_attention(*tensors, attn_mask=m)[:, :, 9:] for m in (mask, whole))
    torch.testing.assert_close(got, want)


def test_what_reads_memory_past_torch_sees_no_token() -> None:
    mask, _ = mask_of(*ENDS)
    with torch._C.DisableTorchFunctionSubclass():
        assert not mask.any()


@pytest.mark.parametrize("change", ["fewer queries", "another batch"])
def test_attention_of_other_shapes_takes_the_mask(change: str) -> None:
    mask, whole = mask_of(*ENDS)
    q, k, v = (t.detach() for t in qkv())
    if change == "fewer queries":
        with pytest.raises(RuntimeError, match="size"):  # torch's own sentence
            F.scaled_dot_product_attention(q[:, :, :5], k, v, mask)
    else:
        q, k, v = (t.expand(2, -1, -1, -1) for t in (q, k, v))
        got = F.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, whole))
    assert mask._filled is not None


@pytest.mark.parametrize("name", ["qwen3_5", pytest.param("jamba", marks=pytest.mark.slow)])
@pytest.mark.parametrize("trains", [False, True])
def test_a_model_fills_no_mask(name: str, trains: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cpu":
        pytest.skip("float32 on a GPU takes the mask")
    filling: list[int] = []
    fill = ByDocument.filled
    monkeypatch.setattr(ByDocument, "filled", lambda mask: (filling.append(1), fill(mask))[1])
    made: list[Tensor] = []
    attended = transformers_attention._attended
    monkeypatch.setattr(transformers_attention, "_attended", lambda **given: made.append(attended(**given)) or made[-1])
    model, docs = new_model(name, device), [torch.randint(3, VOCABULARY, (1, n)) for n in (7, 2, 12)]
    model.train(trains)
    with torch.no_grad(), use_mamba_ops(model):
        want = torch.cat([model(doc, use_cache=False).logits for doc in docs], 1)
    tokens = torch.cat(docs, 1)
    with torch.set_grad_enabled(trains), use_mamba_ops(model):
        for use_cache in (False, True):
            got = model(tokens, use_cache=use_cache, cu_seq_lens_q=torch.tensor(ENDS)).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(made) == 2
    assert all(out is not None for out in made)
    assert not filling


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_and_other_attention_take_a_mask(attention: str, device: torch.device) -> None:
    """As before: documents beside padding, and attention that adds a mask to scores."""
    model = new_model("qwen3_5", device, attn_implementation=attention)
    tokens = torch.randint(3, VOCABULARY, (1, 21), device=device)
    idx = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 2, 12]))[None].to(device)
    with torch.no_grad(), use_mamba_ops(model):
        whole = model(tokens, use_cache=False, seq_idx=idx).logits
        padded = model(tokens, use_cache=False, seq_idx=idx, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(padded, whole, rtol=1e-4, atol=1e-4)


def test_ends_are_heard_where_they_and_numbers_disagree(device: torch.device) -> None:
    """Whatever attends, documents are those of the scans."""
    tokens, ends = torch.randint(3, VOCABULARY, (1, 21), device=device), torch.tensor(ENDS, device=device)
    idx = torch.repeat_interleave(torch.arange(3), torch.tensor([3, 12, 6]))[None].to(device)
    for attention in ("eager", "sdpa"):
        model = new_model("qwen3_5", device, attn_implementation=attention)
        with torch.no_grad(), use_mamba_ops(model):
            got, want = (
                model(tokens, use_cache=False, cu_seq_lens_q=ends, **more).logits for more in ({"seq_idx": idx}, {})
            )
            torch.testing.assert_close(got, want)
        with torch.no_grad(), use_mamba_ops(model):  # several rows: ends can't tell of them
            rows = {"input_ids": tokens.expand(2, -1), "seq_idx": idx.expand(2, -1)}
            got = model(use_cache=False, cu_seq_lens_q=ends, **rows).logits
            torch.testing.assert_close(got, model(use_cache=False, **rows).logits)


@pytest.mark.skipif("inkling" not in ALL_MODELS, reason="this Transformers has no Inkling")
@pytest.mark.usefixtures("no_grad")
def test_attention_that_adds_to_scores_takes_one_document(device: torch.device) -> None:
    """Transformers makes no mask of one, but this attention asks for its numbers."""
    model, tokens = new_model("inkling", device), torch.randint(3, VOCABULARY, (1, 21), device=device)
    with use_mamba_ops(model):
        got = model(tokens, use_cache=False, cu_seq_lens_q=torch.tensor([0, 21], device=device)).logits
        torch.testing.assert_close(got, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("no_grad")
def test_padding_of_a_models_own_is_kept() -> None:
    padding, found = torch.tensor([[False] * 3 + [True] * 6]), []

    def create_causal_mask(
        config: Any, inputs_embeds: Tensor, attention_mask: Any, past_key_values: Any, **more: Any
    ) -> Any:
        return attention_mask

    heard = hearing(create_causal_mask)

    class Model(nn.Module):
        def forward(self, inputs_embeds: Tensor, cu_seq_lens_q: Tensor) -> None:
            config = SimpleNamespace(_attn_implementation="sdpa")
            found.extend(heard(config, inputs_embeds, mask, None) for mask in (padding, None))

    call = telling(Model.forward, is_innermost=True)
    call(Model(), inputs_embeds=torch.zeros(1, 9, 4), cu_seq_lens_q=torch.tensor([0, 4, 9]))
    assert found[0] is padding
    assert type(found[1]) is ByDocument


@pytest.mark.usefixtures("fresh_dynamo")
def test_layers_that_are_compiled_alone(device: torch.device) -> None:
    """They get the mask from an eager model; graphs fill it, of any documents and lengths."""
    model, graphs = new_model("qwen3_5", device), 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    with use_mamba_ops(model):
        cases = []
        for ends in (ENDS, (0, 8, 9, 21), (0, 11, 21), (0, 3, 30), (0, 1, 2, 4, 33), (0, 9, 40)):
            given = {"input_ids": torch.randint(3, VOCABULARY, (1, ends[-1]), device=device)}
            given["cu_seq_lens_q"] = torch.tensor(ends, device=device)
            cases.append((given, model(**given, use_cache=False).logits))
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend=count)
        for given, want in cases:
            got = model(**given, use_cache=False).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            grads = [torch.autograd.grad(out.square().sum(), model.lm_head.weight)[0] for out in (got, want)]
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    assert graphs <= 6  # of two layers: at first, for other numbers of documents, for other lengths


def test_how_torchs_kernel_for_packed_sequences_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a GPU; here a function of torch's signature stands for it."""
    calls: list[dict[str, Any]] = []

    def varlen(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        **more: Any,
    ) -> Tensor:
        calls.append({"ends": cu_seq_q.tolist(), "most": (max_q, max_k), **more})
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        lengths = cu_seq_q.diff().tolist()
        parts = zip(*(t.transpose(0, 1)[None].split(lengths, 2) for t in (query, key, value)), strict=True)
        scale = more["scale"]
        out = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale) for part in parts]
        return torch.cat(out, 2)[0].transpose(0, 1)

    monkeypatch.setattr(transformers_attention, "_varlen", lambda: varlen)
    monkeypatch.setattr(transformers_attention, "_is_cpu", lambda tensor: False)
    monkeypatch.setattr(torch, "get_device_module", lambda *_: torch.cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    mask, whole = mask_of(0, 7, 9, 11, batch=2, length=11)
    q, k, v = (t.detach().bfloat16() for t in qkv(2, 11))
    got = F.scaled_dot_product_attention(q, k, v, mask, scale=0.5)
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), whole, scale=0.5)
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)
    assert calls == [{"ends": [0, 7, 9, 11, 22], "most": (11, 11), "scale": 0.5, "window_size": (-1, 0)}]
    assert mask._filled is None
    single = {"query": q.float(), "key": k.float(), "value": v.float()}
    wide = dict.fromkeys(("query", "key", "value"), q.new_zeros(2, 2, 11, 224))  # some GPUs' kernels have no backward
    for others in ({"dropout_p": 0.1}, {"enable_gqa": True}, single, wide):
        mask, _ = mask_of(0, 7, 9, 11, batch=2, length=11)
        F.scaled_dot_product_attention(**{"query": q, "key": k, "value": v, "attn_mask": mask} | others)
        assert mask._filled is not None
    assert len(calls) == 1
