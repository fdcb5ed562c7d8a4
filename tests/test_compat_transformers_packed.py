"""Packed documents and further tokens on a cache under use_mamba_ops: each document alone, each part of the whole."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

from mamba_ops.compat.transformers import cache_of, use_mamba_ops
from mamba_ops.registry import use_backend
from tests.transformers_models import ALL_MODELS, NOT_FLOAT64, NOT_PACKED, VOCABULARY, new_model

CUTS = (0, 7, 9, 21)
NOT_DAILY = tuple(name for name in ALL_MODELS if name not in ("mamba", "mamba2", "jamba", "qwen3_5", "lfm2"))


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with use_backend("torch"):  # which alone takes float64
        yield


def names(*without: str) -> list[Any]:
    kept = [name for name in ALL_MODELS if name not in without]
    return [pytest.param(n, marks=pytest.mark.slow) if n in NOT_DAILY else n for n in kept]


def packings(device: torch.device) -> list[dict[str, Tensor]]:
    """Ways to say it."""
    lengths = torch.tensor([b - a for a, b in itertools.pairwise(CUTS)])
    positions = torch.cat([torch.arange(int(n)) for n in lengths])[None].to(device)
    idx = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), lengths)[None].to(device)
    ends = torch.tensor(CUTS, dtype=torch.int32, device=device)
    said: list[dict[str, Tensor]] = [{"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}, {"seq_idx": idx}]
    return [{"position_ids": positions} | way for way in ({}, *said)] + said


def documents(device: torch.device) -> list[Tensor]:
    return [torch.randint(3, VOCABULARY, (1, b - a), device=device) for a, b in itertools.pairwise(CUTS)]


@pytest.mark.parametrize("name", names(*NOT_PACKED))
def test_documents_are_themselves_alone(name: str, device: torch.device) -> None:
    """In evaluation and in training, with their gradients."""
    model, docs = new_model(name, device).double(), documents(device)
    with torch.no_grad():
        want = torch.cat([model(doc, use_cache=False).logits for doc in docs], 1)
    tokens, weight = torch.cat(docs, 1), torch.randn_like(want)
    with use_mamba_ops(model):
        alone = torch.cat([model(doc, use_cache=False).logits for doc in docs], 1)
        parameters = [p for p in model.parameters() if p.requires_grad]
        want_grads = torch.autograd.grad((alone * weight).sum(), parameters, allow_unused=True)
        for packing in packings(device):
            with torch.inference_mode():
                got = model(tokens, use_cache=False, **packing).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            got = model(tokens, use_cache=False, **packing).logits
            grads = torch.autograd.grad((got * weight).sum(), parameters, allow_unused=True)
            for one, other in zip(grads, want_grads, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3_5"])
def test_documents_in_checkpointed_layers(name: str, device: torch.device) -> None:
    """A layer that is computed once more in backward is told again."""
    model, tokens = new_model(name, device).double(), torch.cat(documents(device), 1)
    packing = packings(device)[0]
    # On a GPU layers are computed once more on another thread, where use_backend does not hold.
    with use_mamba_ops(model), torch.autograd.set_multithreading_enabled(False):
        grads = []
        for checkpointed in (False, True):
            if checkpointed:
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable({"use_reentrant": False})
                model.train()
            model.zero_grad()
            model(tokens, use_cache=False, **packing).logits.square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", ["mamba", "mamba2", pytest.param("qwen3_5", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("fresh_dynamo", "no_grad")
def test_one_graph_over_packings(name: str, device: torch.device) -> None:
    model, tokens = new_model(name, device).double(), torch.cat(documents(device), 1)
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    idx = packings(device)[2]["seq_idx"]
    ends = torch.tensor(CUTS, device=device)
    places = {"position_ids": torch.arange(21, device=device)[None]} if name == "qwen3_5" else {}
    with use_mamba_ops(model):
        call = torch.compile(
            lambda **packing: model(tokens, use_cache=False, **packing).logits, fullgraph=True, backend=count
        )
        for given in ({"seq_idx": idx}, {"seq_idx": idx.flip(1)}, {"seq_idx": torch.zeros_like(idx)}):
            torch.testing.assert_close(
                call(**given, **places), model(tokens, use_cache=False, **given, **places).logits
            )
        assert graphs == 1
        for other in (ends, torch.tensor([0, 1, 20, 21], device=device)):
            given = {"cu_seq_lens_q": other}
            torch.testing.assert_close(
                call(**given, **places), model(tokens, use_cache=False, **given, **places).logits
            )
        assert graphs == 2


@pytest.mark.usefixtures("fresh_dynamo", "no_grad")
def test_the_first_call_of_a_thread_may_be_compiled(device: torch.device) -> None:
    """Dynamo guards that what a graph sets on the thread was there before, or was not."""
    model, tokens = new_model("mamba2", device), torch.cat(documents(device), 1)
    idx, found = packings(device)[2]["seq_idx"], []

    def run() -> None:
        with torch.no_grad():
            found.append(torch.compile(model, fullgraph=True, backend="eager")(tokens, use_cache=False, seq_idx=idx))

    with use_mamba_ops(model):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        torch.testing.assert_close(found[0].logits, model(tokens, use_cache=False, seq_idx=idx).logits)


@pytest.mark.usefixtures("no_grad")
def test_positions_are_seen_in_graphs(device: torch.device) -> None:
    model, tokens = new_model("qwen3_5", device).double(), torch.cat(documents(device), 1)
    [packing, *_] = packings(device)
    with use_mamba_ops(model):
        want = model(tokens, use_cache=False, **packing).logits
        call = torch.compile(lambda: model.model(tokens, use_cache=False, **packing), fullgraph=True, backend="eager")
        torch.testing.assert_close(model.lm_head(call().last_hidden_state), want)


def test_layers_that_others_checkpoint_are_refused(device: torch.device) -> None:
    """Their second computation is not told where documents begin, where the model drops that on the way."""
    model, tokens = new_model("mamba", device), torch.cat(documents(device), 1)
    for layer in model.backbone.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **more: checkpoint(forward, *args, **more, use_reentrant=False)
    with use_mamba_ops(model):
        model(tokens, use_cache=False).logits.sum().backward()
        loss = model(tokens, use_cache=False, **packings(device)[-1]).logits.sum()
        with pytest.raises(
            ValueError, match="MambaMixer: seq_idx, cu_seq_lens_q, position_ids: got a call that does no"
        ):
            loss.backward()


@pytest.mark.parametrize("name", names(*NOT_FLOAT64))
@pytest.mark.usefixtures("no_grad")
def test_a_prompt_in_parts_is_the_whole(name: str, device: torch.device) -> None:
    """Three calls of several tokens on one cache. Stock Mamba-1 mixers begin anew in each."""
    model, tokens = new_model(name, device).double(), torch.randint(3, VOCABULARY, (2, 21), device=device)

    def in_parts() -> Tensor:
        parts, cache = [], {}
        for begin, end in itertools.pairwise((0, 7, 9, 20, 21)):
            out = model(tokens[:, begin:end], **cache, use_cache=True)
            cache = cache_of(out)
            parts.append(out.logits)
        return torch.cat(parts, 1)

    # Bamba's cache counts no tokens in Transformers 5.23: its attention in parts is another one.
    want = in_parts() if name == "bamba" else model(tokens, use_cache=False).logits
    with use_mamba_ops(model):
        torch.testing.assert_close(in_parts(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen3_next", {"linear_conv_kernel_dim": 8}),
        ("qwen3_next", {"linear_conv_kernel_dim": 2, "hidden_act": "gelu"}),
        ("mamba", {"hidden_act": "gelu", "conv_kernel": 8}),
        ("mamba2", {"hidden_act": "relu", "conv_kernel": 8}),
        ("zamba2", {"use_mem_rope": True}),
    ],
)
@pytest.mark.usefixtures("no_grad")
def test_further_configurations(name: str, change: dict[str, Any], device: torch.device) -> None:
    model = new_model(name, device, **change)
    tokens = torch.randint(3, VOCABULARY, (2, 9), device=device)
    options = {"max_new_tokens": 8, "do_sample": False}
    stock, made = model(tokens, use_cache=False).logits, model.generate(tokens, **options)
    with use_mamba_ops(model):
        torch.testing.assert_close(model(tokens, use_cache=False).logits, stock, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(tokens, **options), made)


def test_forwards_are_put_back(device: torch.device) -> None:
    model = new_model("jamba", device)
    kinds = {type(m) for m in model.modules()}
    before = {kind: kind.forward for kind in kinds}
    with use_mamba_ops(model), use_mamba_ops(model):
        changed = {kind.__name__ for kind in kinds if kind.forward is not before[kind]}
    assert changed == {"JambaMambaMixer", "JambaModel", "JambaForCausalLM", "JambaRMSNorm"}
    assert {kind: kind.forward for kind in kinds} == before


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"cu_seq_lens_q": torch.tensor([CUTS])}, r"cu_seq_lens_q: got shape \(1, 4\), expected \(n \+ 1,\)"),
        ({"seq_idx": torch.zeros(1, 20, dtype=torch.int32)}, r"seq_idx: got shape \(1, 20\), expected \(batch, 21\)"),
    ],
    ids=["ends of two dimensions", "numbers of fewer tokens"],
)
@pytest.mark.usefixtures("no_grad")
def test_documents_of_a_wrong_shape_are_refused(said: dict[str, Tensor], sentence: str, device: torch.device) -> None:
    model, tokens = new_model("qwen3_5", device), torch.cat(documents(device), 1)
    told = {name: value.to(device) for name, value in said.items()}
    with use_mamba_ops(model), pytest.raises(ValueError, match=sentence):
        model(tokens, use_cache=False, **told)
