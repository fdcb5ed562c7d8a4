"""Values of a wrong type, and tensors of a kind that no kernel reads: a sentence that names the op and the argument."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import mamba_ops
from mamba_ops.layers import GatedDeltaNet, KimiDeltaAttention, Mamba, Mamba2, Mamba3, ShortConv
from mamba_ops.registry import Op, Sample, ops
from mamba_ops.registry.codegen import is_optional, is_tensor
from mamba_ops.testing.op_checks import assert_untouched
from tests.test_memory import first, made_in_inference_mode

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning", "ignore:The PyTorch API of nested"),
]
ALL = sorted((op for op in ops().values() if op.qualname.startswith("mamba_ops::")), key=lambda op: op.name)
assert len(ALL) > 15  # with the companions that record gradients

DAILY = ("causal_conv1d_update", "mamba2_mixing", "selective_scan_forward")
OPS = [pytest.param(op, id=op.name, marks=[pytest.mark.slow] * (op.name not in DAILY)) for op in ALL]

VALUES: dict[str, Any] = {
    "a list": [1.0],
    "a numpy.ndarray": np.zeros(3),
    "a numpy.float32": np.float32(0.5),
    "0.5": 0.5,
    "'x'": "x",
}
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "a sparse_coo tensor": lambda t: t.to_sparse(),
    "a quantized tensor": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "a nested tensor": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "a FakeTensor": lambda t: FakeTensorMode().from_tensor(t),
}


def refusal(op: Op[...], arguments: dict[str, Any]) -> str:
    """What a call is refused with, which leaves its tensors as they were."""
    plain = {n: a for n, a in arguments.items() if type(a) is Tensor and a.layout is torch.strided}
    before = Sample("", (), {n: a for n, a in plain.items() if not a.is_quantized})
    copied = before.clone()
    with pytest.raises(ValueError, match=f"{op.qualname}: ") as error:
        op(*arguments.values()) if op.returns else op(**arguments)
    assert_untouched(copied, before)
    return str(error.value)


def arguments_of(op: Op[...]) -> dict[str, Any]:
    sample = op.make_samples("cpu")[0].clone() if op.returns else first(op)
    arguments = {n: a for n, a in op.bind(sample.args, sample.kwargs).items() if n not in op.returns}
    return {"out" if n == "output" else n: a for n, a in arguments.items()}


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_value_is_named(op: Op[...]) -> None:
    """Whatever the argument is, whether or not a right call was remembered."""
    right, seen = arguments_of(op), 0
    for parameter in op.parameters:
        name = "out" if parameter.name == "output" else parameter.name
        if name not in right:
            continue
        wrong = dict(VALUES)
        if is_tensor(parameter) and not is_optional(parameter) and name != "out":
            wrong["None"] = None
        for shown, value in wrong.items():
            if isinstance(value, float | np.floating) and parameter.annotation in (float, float | None):
                continue
            said = refusal(op, {**arguments_of(op), name: value})
            assert said.startswith(f"mamba_ops::{op.name}: {name}: got {shown}, expected "), said
            seen += 1
    assert seen >= 3 * len(right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_a_kind_of_tensor_that_no_kernel_reads_is_named(op: Op[...], kind: str) -> None:
    """After the same call on right tensors too: a sparse tensor has the shape and dtype of a dense one."""
    right = arguments_of(op)
    op(*right.values()) if op.returns else op(**right)
    seen = 0
    for name, value in arguments_of(op).items():
        if isinstance(value, Tensor) and value.numel() and value.is_floating_point():
            said = refusal(op, {**arguments_of(op), name: KINDS[kind](value)})
            assert said.startswith(f"mamba_ops::{op.name}: {name}: got "), said
            seen += 1
    assert seen >= 2


@pytest.mark.parametrize("op", [op for op in ALL if not op.returns], ids=lambda op: op.name)
def test_tensors_on_meta_are_checked_too(op: Op[...]) -> None:
    arguments = {n: a.to("meta") if isinstance(a, Tensor) and n != "counts" else a for n, a in arguments_of(op).items()}
    if not op.composed:  # whose counts are on the host
        op(**arguments)
    name = next(p.name for p in op.parameters[1:] if isinstance(arguments[p.name], Tensor))
    with pytest.raises(ValueError, match=f"^mamba_ops::{op.name}: "):
        op(**{**arguments, name: arguments[name].new_empty(2, 3, 5, 7, 11)})


WRAPPED = "x: got a tensor under a transform"


@pytest.mark.parametrize(
    ("transformed", "error", "said"),
    [
        (lambda f, x: torch.func.vmap(f)(x.expand(2, *x.shape)), ValueError, WRAPPED),
        (lambda f, x: torch.func.jvp(f, (x,), (x,)), NotImplementedError, "got a call under forward-mode"),
        (lambda f, x: torch.func.grad(lambda x: f(x).sum())(x), ValueError, WRAPPED),
    ],
    ids=["vmap", "jvp", "grad"],
)
def test_an_op_that_writes_is_refused_under_a_transform(transformed: Any, error: type[Exception], said: str) -> None:
    """And nothing is written: torch would leave its gradient zero, in silence."""
    cache, weight = torch.zeros(2, 8, 3), torch.randn(8, 4)
    refused = pytest.raises(error, match=f"^mamba_ops::causal_conv1d_update: {said}")
    with torch.enable_grad(), refused:
        transformed(lambda x: mamba_ops.causal_conv1d_update(x, cache, weight), torch.randn(2, 8))
    assert not cache.any()


def test_a_fake_tensor_is_not_asked_for_a_tangent(caplog: pytest.LogCaptureFixture) -> None:
    """Torch would end that in an assertion, which it logs."""
    op = mamba_ops.causal_conv1d_update
    x, cache, weight = torch.randn(2, 8), torch.zeros(2, 8, 3), torch.randn(8, 4)
    fake = FakeTensorMode().from_tensor(weight)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises((ValueError, NotImplementedError), match=op.name):
        op(forward_ad.make_dual(x, x), cache, fake)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(ValueError, match=f"{op.name}: weight: got a Fake"):
        op(x, cache, fake)
    assert not caplog.records
    assert not cache.any()


@pytest.mark.parametrize("size", [0, -1, 4097, 100_000, 2**63 - 1, 2**64])
def test_a_chunk_size_is_one_that_kernels_can_have(size: int) -> None:
    x, dt, B = torch.randn(1, 6, 2, 8), torch.rand(1, 6, 2), torch.randn(1, 6, 1, 8)
    with pytest.raises(ValueError, match=r"^mamba_ops::mamba_chunk_scan: chunk_size: got -?[0-9]+, expected "):
        mamba_ops.mamba_chunk_scan(x, dt, -dt[0, 0], B, B, size)
    with pytest.raises(ValueError, match="chunk_size: got "):
        Mamba2(16, heads=2, head_dim=8, chunk_size=size)


@pytest.mark.parametrize(("name", "limit"), [("dt_max", 1e308), ("dt_min", -1e308), ("dt_min", float("nan"))])
def test_limits_of_steps_are_numbers_that_kernels_have(name: str, limit: float) -> None:
    op = mamba_ops.mamba_chunk_scan.backward_op
    arguments = dict(zip((p.name for p in op._called), op.make_samples("cpu")[0].args, strict=True))
    with pytest.raises(ValueError, match=f"^mamba_ops::mamba_chunk_scan_backward: {name}: got .*, expected a number"):
        op(**arguments | {name: limit})


def test_sizes_of_which_no_output_can_be_made() -> None:
    """The front allocates before the op checks."""
    arguments = arguments_of(mamba_ops.mamba2_mixing)
    del arguments["out"]
    for name in ("heads", "head_dim"):
        for size in (2**40, 2**62):
            said = refusal(mamba_ops.mamba2_mixing, {**arguments, name: size})
            assert "mamba_ops::mamba2_mixing: " in said
            assert "got" in said


def test_a_number_equal_to_the_latest_calls_is_that_number() -> None:
    """2.0 is 2 to the comparison; the kernel gets 2."""
    arguments = arguments_of(mamba_ops.mamba2_mixing)
    expected = mamba_ops.mamba2_mixing(**{n: a.clone() if isinstance(a, Tensor) else a for n, a in arguments.items()})
    for _ in range(2):
        call = {n: a.clone() if isinstance(a, Tensor) else a for n, a in arguments.items()}
        out = mamba_ops.mamba2_mixing(**call)
    call = {n: a.clone() if isinstance(a, Tensor) else a for n, a in arguments.items()}
    out = mamba_ops.mamba2_mixing(**{**call, "heads": float(call["heads"])})
    assert torch.equal(out, expected)


# -- layers -----------------------------------------------------------------------------------------------------------

LAYERS = (
    Mamba(16, dstate=4),
    Mamba2(16, heads=2, head_dim=8, dstate=4),
    GatedDeltaNet(16, num_k_heads=1, num_v_heads=2, head_k_dim=8, head_v_dim=8),
    KimiDeltaAttention(16, num_heads=2, head_dim=8),
)
STATES: dict[str, Callable[[Tensor], Any]] = {
    "expanded": lambda t: t[:1].expand(t.shape),
    "overlapping": lambda t: t.new_zeros(t.numel()).as_strided(t.shape, [max(s - 1, 1) for s in t.stride()]),
    "negated": torch._neg_view,
    "imaginary": lambda t: torch.conj(t.to(torch.complex64)).imag,
    "of inference mode": made_in_inference_mode,
    "sparse": lambda t: t.to_sparse(),
    "on meta": lambda t: t.to("meta"),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "a list": lambda t: [1.0],
    "requires grad": lambda t: t.clone().requires_grad_(),
}


SIZES: dict[type, dict[str, Any]] = {
    Mamba: {"hidden_size": 16, "d_inner": 32, "dstate": 4, "dt_rank": 1},
    Mamba2: {"hidden_size": 16, "heads": 2, "head_dim": 8, "dstate": 4, "groups": 1, "chunk_size": 8},
    GatedDeltaNet: {"hidden_size": 16, "num_k_heads": 1, "num_v_heads": 2, "head_k_dim": 8, "head_v_dim": 8},
    ShortConv: {"hidden_size": 16},
    Mamba3: {"hidden_size": 16, "heads": 2, "head_dim": 8, "dstate": 4, "groups": 1, "chunk_size": 8, "mimo_rank": 2},
    KimiDeltaAttention: {"hidden_size": 16, "num_heads": 2, "head_dim": 8},
}


@pytest.mark.parametrize("layer", SIZES)
def test_a_layer_names_what_it_cannot_be_made_of(layer: Any) -> None:
    sizes = {**SIZES[layer], **({} if layer is Mamba3 else {"d_conv": 4})}
    layer(**sizes)
    eps = {} if layer is ShortConv else {"eps": 0}
    layer(**{name: np.int64(size) for name, size in sizes.items()}, **eps, dtype=torch.bfloat16, device="cpu")
    wrong = [(name, value) for name in sizes for value in ("x", -1, 0, 2.5, True, [1], torch.tensor(2))]
    wrong += [(name, None) for name in sizes if name not in ("d_inner", "dt_rank")]
    wrong += [("d_conv", 9)] * ("d_conv" in sizes)
    wrong += [("eps", value) for value in ("x", None, -1.0, float("nan")) if eps]
    wrong += [("dtype", "float32"), ("dtype", torch.int32), ("device", "nowhere"), ("device", 2.5)]
    if layer is Mamba3:
        wrong += [("rope_fraction", 0.7), ("A_floor", 0.0), ("dstate", 3), ("groups", 3), ("decay_dtype", torch.int8)]
    if layer is Mamba2:
        wrong += [("chunk_size", 10**6), ("dt_min", None), ("dt_max", "x"), ("decay_dtype", torch.int8), ("groups", 3)]
    for name, value in wrong:
        with pytest.raises(ValueError, match=rf"^{layer.__name__}: {name}: got .*, expected "):
            layer(**{**sizes, name: value})


@pytest.mark.parametrize("wrong", STATES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_layer_refuses_an_ssm_state_before_it_convolves(layer: Any, wrong: str) -> None:
    layer.requires_grad_(False)
    for call, shape in ((layer, (2, 5, 16)), (layer.step, (2, 16))):
        conv_state, ssm_state = layer.empty_caches(2)
        with (
            torch.set_grad_enabled(wrong == "requires grad"),
            pytest.raises(ValueError, match=rf"^{type(layer).__name__}: .*ssm_state: got "),
        ):
            call(torch.randn(shape), conv_state, STATES[wrong](ssm_state))
        assert not conv_state.any()


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_layer_refuses_an_ssm_state_under_a_transform_before_it_convolves(layer: Any) -> None:
    layer.requires_grad_(False)
    said = rf"^{type(layer).__name__}: ssm_state: got a tensor under a transform"
    for call, shape in ((layer, (2, 5, 16)), (layer.step, (2, 16))):
        conv_state, ssm_state = layer.empty_caches(2)
        x = torch.randn(shape)
        with torch.no_grad(), pytest.raises(ValueError, match=said):
            torch.vmap(lambda state: call(x, conv_state, state))(ssm_state.expand(2, *ssm_state.shape))  # noqa: B023
        with torch.no_grad(), forward_ad.dual_level(), pytest.raises(ValueError, match=said):
            call(x, conv_state, forward_ad.make_dual(ssm_state, ssm_state))
        assert not conv_state.any()


@pytest.mark.parametrize("layer", [*LAYERS, ShortConv(16)], ids=lambda layer: type(layer).__name__)
def test_a_layer_names_what_is_wrong_with_its_tokens(layer: Any) -> None:
    layer.requires_grad_(False)
    caches = layer.empty_caches(2)
    wrong = (None, [1.0], torch.randn(2, 5, 15), torch.randn(16), torch.ones(2, 16).int(), torch.randn(2, 16).double())
    for hidden_states in (*wrong, torch.randn(2, 5, 16, device="meta"), torch.randn(2, 16).to_sparse()):
        for call in (layer, layer.step):
            with pytest.raises(ValueError, match=rf"^{type(layer).__name__}: hidden_states: got .*, expected "):
                call(hidden_states, *caches)
    for name, value in (("plan", 3), ("null_slot", -1.0)):
        with pytest.raises(ValueError, match=rf"^{type(layer).__name__}: {name}: got .*, expected "):
            layer(torch.randn(2, 5, 16), *caches, **{name: value})
    assert not any(cache.any() for cache in caches)


@pytest.mark.parametrize("name", ["causal_conv1d_update", "selective_state_update", "gated_delta_rule_update"])
def test_a_cache_of_no_slots_has_none_for_padding(name: str) -> None:
    op = ops()[name]
    sample = next(s for s in op.make_samples("cpu") if s.kwargs.get("slots") is not None)
    arguments = {"out" if n == "output" else n: a for n, a in op.bind(sample.args, sample.kwargs).items()}
    cache = "conv_state" if "conv_state" in arguments else "ssm_state"
    arguments |= {cache: arguments[cache][:0], "slots": torch.full_like(arguments["slots"], -1)}
    with pytest.raises(ValueError, match=f"^mamba_ops::{name}: {cache}: got no slots, expected at least 1"):
        op(**arguments)
