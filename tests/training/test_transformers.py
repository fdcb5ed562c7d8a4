"""Transformers' own models train on our ops: gradients, padding, packing, adapters, checkpointing, one graph."""

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

pytest.importorskip("transformers")

from mamba_ops.compat.transformers import cache_of, use_mamba_ops
from mamba_ops.compat.transformers_structure import mixers_of
from tests.transformers_models import ALL_MODELS, NOT_PACKED, VOCABULARY, new_model

DAILY = ("mamba", "mamba2", "qwen3_5")
SUMS = ("inkling", "inkling2")  # a layer's input goes several ways: gradients are summed in another order


def models(*daily: str, without: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """One test a model; those not named are slow."""
    marked = [
        pytest.param(name, marks=() if name in daily else pytest.mark.slow)
        for name in ALL_MODELS
        if name not in without
    ]
    return pytest.mark.parametrize("name", marked)


class _Float64(SimpleNamespace):
    """torch for a modeling file in which float32 is float64: what stock computes in float32 whatever the model is."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def stock_in_float64(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the modeling file of a model in float64 convert nothing to float32."""
    files = {type(m).__module__ for m in model.modules() if "modeling_" in type(m).__module__}
    assert files
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for file in files:
            patch.setattr(sys.modules[file], "torch", _Float64())
        yield


def batch(*, padded: bool = False, length: int = 21) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
    mask, labels = torch.ones_like(tokens), tokens.clone()
    if padded:
        mask[1, :7], tokens[1, :7], labels[1, :7] = 0, 0, -100
    return {"input_ids": tokens, "labels": labels} | ({"attention_mask": mask} if padded else {})


def gradients(model: Any, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Of every parameter that has one; those of experts that no token went to have none."""
    model.zero_grad()
    model(**inputs, **options).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) > 3
    return found


def in_float64(model: Any, name: str) -> Any:
    other = new_model(name, "cpu").train(model.training).double()
    other.load_state_dict(model.state_dict())
    return other


def furthest(got: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest distance of a gradient to the truth, to the largest value of that gradient."""
    assert got.keys() == truth.keys()
    return max(float((got[n] - truth[n]).abs().max() / truth[n].abs().max().clamp(min=1e-30)) for n in truth)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["a cache is made", "no cache"])
@models(*DAILY)
def test_gradients_are_as_near_to_the_truth_as_stock(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With labels and left padding, in train mode. Both are far from the truth by rounding alone."""
    model, inputs = new_model(name, "cpu").train(), batch(padded=True)
    truth_of = in_float64(model, name)
    with stock_in_float64(truth_of, monkeypatch):
        truth = gradients(truth_of, inputs, **options)
    stock = furthest(gradients(model, inputs, **options), truth)
    with use_mamba_ops(model):
        ours = furthest(gradients(model, inputs, **options), truth)
    assert ours <= max(stock, 1e-5)


@models("mamba2")
def test_a_padded_row_is_the_row_alone_in_train_mode(name: str) -> None:
    model, inputs = new_model(name, "cpu").train(), batch(padded=True)
    spread(model)
    with torch.no_grad(), use_mamba_ops(model):
        alone = model(inputs["input_ids"][1:, 7:], use_cache=False).logits[0]
        padded = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits[1, 7:]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


def spread(model: nn.Module) -> None:
    """Give matrices and biases of convolutions values large enough that a leak shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 or name.endswith("conv1d.bias"):
                parameter.normal_(std=0.3)


class _Wrapped(nn.Module):
    """A projection with something of its own on top, as adapters and quantisers put it there."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.calls = base, 0

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.base(x) + 1.0


@models("mamba2", without=("inkling", "inkling2"))  # mixers there have no projection
def test_a_wrapped_projection_is_called(name: str) -> None:
    model = new_model(name, "cpu").train()
    with use_mamba_ops(model) as binding:
        bound = [name.rpartition(".") for name in binding.bound]
    functions = {function for *_, function in bound}
    kinds = {kind for file, *_ in bound for kind in mixers_of(vars(sys.modules[file]), file, functions)}
    mixers = [module for module in model.modules() if isinstance(module, tuple(kinds))]
    assert mixers
    last = "o_proj" if hasattr(mixers[0], "o_proj") else "out_proj"
    wrapped = [_Wrapped(getattr(mixer, last)) for mixer in mixers]
    for mixer, module in zip(mixers, wrapped, strict=True):
        setattr(mixer, last, module)
    inputs = {"input_ids": batch()["input_ids"]}
    with torch.no_grad():
        stock = model(**inputs, use_cache=False).logits
        with use_mamba_ops(model):
            before = [module.calls for module in wrapped]
            torch.testing.assert_close(model(**inputs, use_cache=False).logits, stock, rtol=1e-4, atol=1e-4)
    assert [module.calls for module in wrapped] == [calls + 1 for calls in before]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("mamba", ["in_proj", "x_proj"]),
        ("mamba2", ["in_proj"]),
        ("bamba", ["in_proj", "q_proj"]),
        ("qwen3_5", "all-linear"),
    ],
)
def test_low_rank_adapters_train(name: str, targets: Any) -> None:
    """peft's get the gradients that stock gives them, and nothing else has any; it refuses some projections."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model, inputs = peft.get_peft_model(new_model(name, "cpu"), config).train(), batch(padded=True)
    stock = gradients(model, inputs, use_cache=False)
    with use_mamba_ops(model):
        ours = gradients(model, inputs, use_cache=False)
    assert all("lora" in n for n in stock)
    assert furthest(ours, stock) < 1e-4


@pytest.mark.parametrize("use_reentrant", [False, True])
@models("mamba2")
def test_gradient_checkpointing_changes_nothing(name: str, use_reentrant: bool) -> None:
    model, inputs = new_model(name, "cpu").train(), batch(padded=True)
    with use_mamba_ops(model):
        plain = gradients(model, inputs, use_cache=False)
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": use_reentrant})
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        checkpointed = gradients(model, inputs, use_cache=False)
    nearly = 1e-6 if name in SUMS else 0.0
    for parameter, gradient in plain.items():
        torch.testing.assert_close(checkpointed[parameter], gradient, rtol=0, atol=nearly, msg=parameter)


@pytest.mark.slow
@pytest.mark.parametrize("name", DAILY)
def test_autocast(name: str) -> None:
    """In bfloat16 our gradients are as near to those of float32 as stock's are."""
    stock, ours = [], []
    for seed in range(3):  # one model's furthest gradient is a matter of luck
        torch.manual_seed(seed)
        model, inputs = new_model(name, "cpu").train(), batch()
        truth = gradients(model, inputs, use_cache=False)
        with torch.autocast("cpu", torch.bfloat16):
            stock.append(furthest(gradients(model, inputs, use_cache=False), truth))
            with use_mamba_ops(model):
                ours.append(furthest(gradients(model, inputs, use_cache=False), truth))
    assert 1e-4 < max(ours) <= 2 * max(stock)


def loss(model: Any, tokens: Tensor) -> Tensor:
    result: Tensor = model(tokens, labels=tokens, use_cache=False).loss
    return result


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["mamba", "jamba", "mamba2", "falcon_h1", "nemotron_h", "qwen3_5", "lfm2"])
def test_a_compiled_training_step_is_one_graph_each_way(name: str) -> None:
    """For three lengths, with the gradients of the eager step."""
    model = new_model(name, "cpu").train()
    step = torch.compile(partial(loss, model), fullgraph=True, dynamic=True, backend="aot_eager")
    with use_mamba_ops(model):
        for length in (21, 33, 47):
            tokens = batch(length=length)["input_ids"]
            eager = gradients(model, {"input_ids": tokens, "labels": tokens}, use_cache=False)
            model.zero_grad()
            step(tokens).backward()
            compiled = {n: p.grad for n, p in model.named_parameters() if n in eager}
            assert furthest(compiled, eager) < 1e-4
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["ok"] == 1


# -- what a model is called with --------------------------------------------------------------------------------------

LENGTHS = (7, 2, 12)


def documents(*, seq_idx: bool, cu_seqlens: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Documents by themselves, and a call with all of them in one row."""
    generator = torch.Generator().manual_seed(0)
    alone = [torch.randint(3, VOCABULARY, (1, length), generator=generator) for length in LENGTHS]
    lengths = torch.tensor(LENGTHS)
    ends = torch.cat((torch.zeros(1), lengths.cumsum(0))).to(torch.int32)
    call = {"input_ids": torch.cat(alone, 1), "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
    if seq_idx:
        call["seq_idx"] = torch.repeat_interleave(torch.arange(len(LENGTHS), dtype=torch.int32), lengths)[None]
    if cu_seqlens:
        call |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
    return alone, call


def read(model: Any, call: dict[str, Tensor]) -> Tensor:
    """Logits. Transformers' Mamba2ForCausalLM hands nothing of packing on to its backbone, which does so to mixers."""
    if hasattr(model, "backbone"):
        return model.lm_head(model.backbone(**call, use_cache=False).last_hidden_state)
    return model(**call, use_cache=False).logits


@pytest.mark.parametrize("how", ["seq_idx", "cu_seqlens", "both"])
@models("qwen3_5", "mamba2", without=(*NOT_PACKED, "zamba"))
def test_packed_documents_are_each_alone(name: str, how: str) -> None:
    """Logits and gradients; zamba's, of these weights in float32, are rounding."""
    model = new_model(name, "cpu").train()
    spread(model)
    alone, packed = documents(seq_idx=how != "cu_seqlens", cu_seqlens=how != "seq_idx")
    with use_mamba_ops(model):
        logits = torch.cat([read(model, {"input_ids": document}) for document in alone], 1)
        expected = pulled(model, logits)
        got = read(model, packed)
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)
        assert furthest(pulled(model, got), expected) < 1e-4


def pulled(model: Any, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits.sin().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_5"])
def test_packed_documents_are_one_graph(name: str) -> None:
    """With cu_seq_lens_q nothing waits for where documents begin, seq_idx given too or not."""
    model = new_model(name, "cpu").train()
    step = torch.compile(partial(read, model), fullgraph=True, backend="aot_eager")
    with use_mamba_ops(model):
        _, packed = documents(seq_idx=True, cu_seqlens=True)
        expected = pulled(model, read(model, packed))
        assert furthest(pulled(model, step(packed)), expected) < 1e-4
    assert counters["stats"]["unique_graphs"] == 1


@models("falcon_h1")
@pytest.mark.usefixtures("no_grad")
def test_what_stock_ignores_is_ignored(name: str) -> None:
    """The usual decode loop passes cache_position, tokenizers return token_type_ids."""
    model, tokens = new_model(name, "cpu"), batch()["input_ids"][:1]

    def loop() -> Tensor:
        others = {"cache_position": torch.arange(tokens.shape[1]), "token_type_ids": torch.zeros_like(tokens)}
        out = model(tokens, use_cache=True, **others)
        return model(
            tokens[:, -1:], **cache_of(out), use_cache=True, cache_position=torch.tensor([tokens.shape[1]])
        ).logits

    stock = loop()
    with use_mamba_ops(model):
        torch.testing.assert_close(loop(), stock, rtol=1e-4, atol=1e-5)
