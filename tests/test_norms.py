"""Norms of layers and of other libraries' names: one call of rms_norm where a kernel runs at once, else torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mamba_ops
from mamba_ops.compat.fla import norms as fla
from mamba_ops.compat.mamba_ssm import norms as mamba_ssm
from mamba_ops.compat.vllm_delta_rule import RMSNormGated as VllmNorm
from mamba_ops.layers import GatedRMSNorm, gated_rms_norm
from mamba_ops.layers.norms import RMSNorm
from mamba_ops.testing.judge import error_budget
from tests.conftest import ACCELERATOR

pytest.importorskip("triton", reason="the kernel is Triton's")

DEVICE = ACCELERATOR or torch.device("cpu")
SIZE = 24
OP = "mamba_ops::rms_norm"


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def with_weight(norm: Any) -> Any:
    """Numbers that are not all alike."""
    if norm.weight is not None:
        norm.weight.data.copy_(normal(SIZE, seed=7) + 1)
    return norm.to(DEVICE).requires_grad_(False)


X, GATE, WIDE = normal(4, 3, SIZE), normal(4, 3, SIZE, seed=1), normal(4, 3, 2 * SIZE, seed=2)
RESIDUAL, WEIGHT = normal(4, 3, SIZE, dtype=torch.float32, seed=3), normal(SIZE, seed=4)
NEW: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE}
CALLS: dict[str, Callable[[], Any]] = {
    "layers.gated_rms_norm": lambda: gated_rms_norm(X, WIDE[..., SIZE:], WEIGHT, groups=2),
    "layers.gated_rms_norm, sigmoid": lambda: gated_rms_norm(
        X, GATE, WEIGHT, norm_before_gate=True, activation="sigmoid"
    ),
    "layers.GatedRMSNorm": lambda: with_weight(GatedRMSNorm(SIZE, norm_before_gate=True, **NEW))(X, GATE),
    "layers.RMSNorm": lambda: with_weight(RMSNorm(SIZE, eps=1e-5, **NEW))(X),
    "mamba_ssm layer_norm_fn": lambda: mamba_ssm.layer_norm_fn(
        X, WEIGHT, None, RESIDUAL, prenorm=True, is_rms_norm=True
    ),
    "mamba_ssm rms_norm_fn": lambda: mamba_ssm.rms_norm_fn(X, WEIGHT, None, prenorm=True, residual_in_fp32=True),
    "mamba_ssm rms_norm_fn, no residual": lambda: mamba_ssm.rms_norm_fn(X, WEIGHT, None, prenorm=True),
    "mamba_ssm rms_norm_fn, narrow": lambda: mamba_ssm.rms_norm_fn(X, WEIGHT, None, GATE, prenorm=True, eps=0.1),
    "mamba_ssm RMSNorm": lambda: with_weight(mamba_ssm.RMSNorm(SIZE, **NEW))(X, RESIDUAL),
    "mamba_ssm rmsnorm_fn": lambda: mamba_ssm.rmsnorm_fn(X, WEIGHT, None, GATE, group_size=8, norm_before_gate=False),
    "mamba_ssm RMSNormGated": lambda: with_weight(mamba_ssm.RMSNormGated(SIZE, **NEW))(X, GATE),
    "fla rms_norm_gated": lambda: fla.rms_norm_gated(X, GATE.flatten(), WEIGHT, None, residual=RESIDUAL, prenorm=True),
    "fla FusedRMSNormGated": lambda: fla.FusedRMSNormGated(SIZE, False, activation="sigmoid", **NEW)(X, GATE),
    "fla RMSNorm": lambda: with_weight(fla.RMSNorm(SIZE, **NEW))(X),
    "vLLM RMSNormGated": lambda: with_weight(VllmNorm(SIZE, group_size=12, **NEW))(X, GATE),
    "vLLM RMSNormGated, no gate": lambda: with_weight(VllmNorm(SIZE, activation="sigmoid", **NEW))(X),
}


def runs(call: Callable[[], Any], backend: str = "triton") -> tuple[Any, list[str]]:
    """What a call returns, and the ops that it ran."""
    with mamba_ops.use_backend(backend), mamba_ops.record_selections() as record:
        result = call()
    return result, [selection.op for selection in record]


def tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", CALLS)
def test_a_norm_is_one_call_where_there_is_a_kernel(name: str) -> None:
    """And gives what torch's functions give, rounded otherwise at most."""
    with torch.no_grad():
        found, ran = runs(CALLS[name])
        expected, in_torch = runs(CALLS[name], "torch")
    assert (ran, in_torch) == ([OP], [])
    assert len(tensors(found)) == len(tensors(expected))
    for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        wide = theirs.double()
        step = error_budget(wide, wide, ours.dtype)  # the interpreter cuts off what hardware rounds
        assert ((ours.double() - wide).abs() <= 2 * step + 1e-6).all()


OTHERS: dict[str, Callable[[], Any]] = {
    "a bias": lambda: mamba_ssm.layer_norm_fn(X, WEIGHT, WEIGHT, is_rms_norm=True),
    "a mean": lambda: mamba_ssm.layer_norm_fn(X, WEIGHT, None),
    "two weights": lambda: mamba_ssm.rms_norm_fn(X, WEIGHT, None, weight1=WEIGHT),
    "a scale of rows": lambda: mamba_ssm.rms_norm_fn(X, WEIGHT, None, rowscale=normal(4, 3)),
    "dropout": lambda: mamba_ssm.rms_norm_fn(X, WEIGHT, None, dropout_p=0.5),
    "masks": lambda: mamba_ssm.rms_norm_fn(X, WEIGHT, None, return_dropout_mask=True),
    "no weight": lambda: mamba_ssm.rms_norm_fn(X, None, None, RESIDUAL, weight1=WEIGHT),
    "a broadcast gate": lambda: gated_rms_norm(X, GATE[:1], WEIGHT),
    "float64": lambda: gated_rms_norm(X.double(), GATE, WEIGHT),
    "a gate of float64": lambda: mamba_ssm.rmsnorm_fn(X, WEIGHT, None, GATE.double()),
    "fla, a bias": lambda: fla.rms_norm_gated(X, GATE, WEIGHT, WEIGHT),
    "fla, a mean": lambda: fla.layer_norm_gated(X, GATE, WEIGHT, None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_op_does_not_do_is_left_to_torch(name: str) -> None:
    with torch.no_grad():
        assert runs(OTHERS[name])[1] == []


def test_groups_of_more_channels_than_kernels_take_are_left_to_torch() -> None:
    x, weight = normal(1, 16400), normal(16400)
    assert runs(lambda: gated_rms_norm(x, x, weight))[1] == []
    assert runs(lambda: gated_rms_norm(x, x, weight, groups=2))[1] == [OP]


def test_groups_that_do_not_fit_are_refused_as_by_torch() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError):
        runs(lambda: with_weight(VllmNorm(SIZE, group_size=10, **NEW))(X, GATE))


@pytest.mark.skipif(ACCELERATOR is not None, reason="about CPUs")
def test_on_a_cpu_norms_are_torchs() -> None:
    """By default, so that their bits are what they were."""
    with mamba_ops.record_selections() as record, torch.no_grad():
        gated_rms_norm(X, GATE, WEIGHT)
    assert record == []


def test_where_a_gradient_is_recorded_norms_are_torchs() -> None:
    weight = WEIGHT.clone().requires_grad_()
    out, ran = runs(lambda: gated_rms_norm(X, GATE, weight))
    assert ran == []
    assert out.requires_grad
    x = X.clone().requires_grad_()
    residual = RESIDUAL.clone().requires_grad_()
    assert runs(lambda: gated_rms_norm(x, GATE, WEIGHT))[1] == []
    assert runs(lambda: mamba_ssm.rms_norm_fn(X, WEIGHT, None, residual, prenorm=True))[1] == []
    with torch.no_grad():
        assert runs(lambda: gated_rms_norm(x, GATE, weight))[1] == [OP]
    with torch.inference_mode():
        assert runs(lambda: gated_rms_norm(x, GATE, weight))[1] == [OP]


def test_in_compiled_and_traced_programs_norms_are_torchs() -> None:
    norm = with_weight(GatedRMSNorm(SIZE, **NEW))
    with torch.no_grad():
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        assert runs(lambda: compiled(X, GATE))[1] == []
        exported = torch.export.export(norm, (X, GATE), strict=False)
        assert not [n for n in exported.graph.nodes if "mamba_ops" in str(n.target)]
        traced, ran = runs(lambda: torch.jit.trace(norm, (X, GATE), check_trace=False))
        assert ran == []
        assert "mamba_ops::" not in str(traced.graph)


def test_under_transforms_norms_are_torchs() -> None:
    def norm(x: Tensor) -> Tensor:
        return gated_rms_norm(x, GATE[0], WEIGHT)

    with torch.no_grad():
        mapped, ran = runs(lambda: torch.vmap(norm)(X))
        assert ran == []
        assert torch.equal(mapped, torch.stack([runs(lambda x=x: norm(x), "torch")[0] for x in X]))
        (_, tangent), ran = runs(lambda: torch.func.jvp(norm, (X[0].float(),), (X[1].float(),)))
        assert ran == []
        assert tangent.any()
    gradient, ran = runs(lambda: torch.func.grad(lambda x: norm(x).float().square().sum())(X[0].float()))
    assert ran == []
    assert gradient.any()


class Answering(Tensor):
    """A class with operators of its own."""


def test_tensors_of_other_classes_keep_torchs_functions() -> None:
    with torch.no_grad():
        assert runs(lambda: gated_rms_norm(X.as_subclass(Answering), GATE, WEIGHT))[1] == []
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(X), mode.from_tensor(GATE), mode.from_tensor(WEIGHT)
            out, ran = runs(lambda: gated_rms_norm(*fake))
        assert ran == []
        assert out.shape == X.shape


def test_no_rows_no_tokens_and_autocast() -> None:
    with torch.no_grad():
        for empty in (X[:0], X[:, :0]):
            out, ran = runs(lambda empty=empty: gated_rms_norm(empty, empty, WEIGHT))
            assert ran == [OP]
            assert out.shape == empty.shape
        plain = runs(lambda: gated_rms_norm(X, GATE, WEIGHT))[0]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out, ran = runs(lambda: gated_rms_norm(X, GATE, WEIGHT))
    assert ran == [OP]
    assert torch.equal(out, plain)
