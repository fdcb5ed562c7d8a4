"""Mamba-3 with several inputs and outputs a head: mamba_ssm's formulas, gradients, graphs, packed rows."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional

import mamba_ops
from mamba_ops import use_backend
from mamba_ops.compat import mamba_ssm
from mamba_ops.compat.mamba_ssm.generation import InferenceParams
from mamba_ops.layers import Mamba3

VARIANTS: list[dict[str, Any]] = [
    {},
    {"is_outproj_norm": True, "rope_fraction": 1.0},
    {"ngroups": 2, "mimo_rank": 1},
]


@torch.no_grad()
def mixer(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"headdim": 8, "chunk_size": 4, "is_mimo": True, "mimo_rank": 3, **options}
    new = mamba_ssm.Mamba3(16, 16, **sizes).double()
    for parameter in new.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return new


def angles_of(mixer: Any, projected: Tensor, steps: Tensor) -> Tensor:
    """How far every head is turned at every token, (batch, length, 1, heads, angles); not less whole turns."""
    turns = torch.tanh(projected)[:, :, None] * steps[..., None] * math.pi
    return turns.cumsum(1).unsqueeze(2)


def turned(vectors: Tensor, angle: Tensor) -> Tensor:
    """Both halves of the state's axis are the parts of complex numbers, of which the first are turned."""
    first, second = vectors.chunk(2, dim=-1)
    turn = functional.pad(torch.polar(torch.ones_like(angle), angle), (0, first.shape[-1] - angle.shape[-1]), value=1)
    found = torch.complex(first, second) * turn
    return torch.cat((found.real, found.imag), dim=-1)


def mamba_ssms(mixer: Any, u: Tensor) -> Tensor:
    """What mamba_ssm computes of (batch, length, d_model), by its formulas, all tokens at once but for the state."""
    w = dict(mixer.named_parameters())
    rank, groups, heads, dim, dstate = mixer.mimo_rank, mixer.num_bc_heads, mixer.nheads, mixer.headdim, mixer.d_state
    bc = rank * groups * dstate
    parts = (u @ w["in_proj.weight"].T).split([heads * dim] * 2 + [bc] * 2 + [heads] * 3 + [mixer.num_rope_angles], -1)
    z, x, B, C, dt, A, trap, angles = parts
    z, x = z.unflatten(-1, (heads, dim)), x.unflatten(-1, (heads, dim))
    step = functional.softplus(dt + w["dt_bias"])
    decay = torch.exp(-functional.softplus(A).clamp(min=mixer.A_floor) * step)
    angle = angles_of(mixer, angles, step)

    def vectors(raw: Tensor, name: str) -> Tensor:
        normed = functional.rms_norm(
            raw.unflatten(-1, (rank, groups, dstate)), (dstate,), w[f"{name}_norm.weight"], 1e-5
        )
        return turned(normed.repeat_interleave(heads // groups, -2) + w[f"{name}_bias"].transpose(0, 1), angle)

    k, q, own = vectors(B, "B"), vectors(C, "C"), torch.sigmoid(trap) * step
    v = torch.einsum("blhp,hrp->blrhp", x, w["mimo_x"])
    added = torch.einsum("blrhp,blrhn->blhpn", v, k)
    state, before, y = torch.zeros_like(added[:, 0]), torch.zeros_like(added[:, 0]), []
    for t in range(u.shape[1]):
        late = (step - own)[:, t, :, None, None] * before
        state = decay[:, t, :, None, None] * (state + late) + own[:, t, :, None, None] * added[:, t]
        before = added[:, t]
        y.append(torch.einsum("bhpn,brhn->brhp", state, q[:, t]))
    out = torch.stack(y, dim=1) + w["D"][:, None] * v
    gate = functional.silu(torch.einsum("blhp,hrp->blrhp", z, w["mimo_z"]))
    if mixer.is_outproj_norm:
        out = functional.rms_norm(out, (dim,), eps=1e-5) * w["norm.weight"].view(heads, dim)
    out = torch.einsum("blrhp,hrp->blhp", out * gate, w["mimo_o"])
    return out.flatten(-2) @ w["out_proj.weight"].T


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_prefill_then_32_steps_are_mamba_ssms(options: dict[str, Any]) -> None:
    new, u = mixer(**options), torch.randn(2, 43, 16, dtype=torch.double)
    want = mamba_ssms(new, u)
    with torch.no_grad(), use_backend("torch"):
        torch.testing.assert_close(new(u), want)
        params = InferenceParams(43, 2)
        new.layer_idx, out = 0, []
        for begin, end in ((0, 4), (4, 11), *((t, t + 1) for t in range(11, 43))):
            out.append(new(u[:, begin:end], inference_params=params))
            params.seqlen_offset = end
    torch.testing.assert_close(torch.cat(out, 1), want)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradients_are_those_of_the_formulas(options: dict[str, Any]) -> None:
    new, u = mixer(**options), torch.randn(2, 11, 16, dtype=torch.double, requires_grad=True)
    with torch.enable_grad(), use_backend("torch"):
        inputs = [u, *new.parameters()]
        got, want = (torch.autograd.grad(f(u).square().sum(), inputs) for f in (new, lambda u: mamba_ssms(new, u)))
    for name, one, other in zip(["u", *dict(new.named_parameters())], got, want, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=name)


def small(**options: Any) -> Mamba3:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"heads": 2, "head_dim": 2, "dstate": 4, "chunk_size": 3, "is_mimo": True, "mimo_rank": 2}
    return Mamba3(4, **sizes, dtype=torch.float64, decay_dtype=torch.float64, **options)


def test_gradients_are_right_where_rows_are_packed() -> None:
    layer = small()
    with torch.enable_grad(), use_backend("torch"):
        x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
        ends = torch.tensor([0, 4, 7])
        names, parameters = zip(*layer.named_parameters(), strict=True)

        def call(x: Tensor, *values: Tensor) -> Tensor:
            given = dict(zip(names, values, strict=True))
            return torch.func.functional_call(layer, given, (x,), {"cu_seqlens": ends})

        # what is turned is summed as whole numbers: far finer than the step of the differences
        assert torch.autograd.gradcheck(call, (x, *parameters), eps=1e-4, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
def test_training_is_one_graph_forward_and_one_backward() -> None:
    layer = small()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.enable_grad(), use_backend("torch"):
        for length in (20, 21, 33):
            x = torch.randn(2, length, 4, dtype=torch.double, requires_grad=True)
            inputs = [x, *layer.parameters()]
            grads = [torch.autograd.grad(f(x).square().mean(), inputs) for f in (layer, compiled)]
            torch.testing.assert_close(grads[1], grads[0])
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["ok"] == 1


@pytest.mark.parametrize("out_norm", [False, True])
def test_packed_rows_are_as_alone(out_norm: bool) -> None:
    layer = small(out_norm=out_norm)
    x = torch.randn(17, 4, dtype=torch.double)
    with torch.no_grad(), use_backend("torch"):
        alone = torch.cat([layer(x[None, :5])[0], layer(x[None, 5:])[0]])
        torch.testing.assert_close(layer(x, cu_seqlens=torch.tensor([0, 5, 5, 17])), alone)
        caches = layer.empty_caches(3, dtype=torch.float64, state_dtype=torch.float64)
        torch.testing.assert_close(layer(x, *caches, cu_seqlens=torch.tensor([0, 5, 5, 17])), alone)
        assert layer(torch.randn(0, 3, 4).double()).shape == (0, 3, 4)
        assert layer(x, cu_seqlens=torch.tensor([0])).shape == (17, 4)


@pytest.mark.parametrize("out_norm", [False, True])
def test_all_parameters_have_gradients_where_there_are_no_rows(out_norm: bool) -> None:
    layer = small(out_norm=out_norm)
    with torch.enable_grad():
        layer(torch.randn(5, 4).double(), cu_seqlens=torch.tensor([0])).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_wrong_rows_are_named_as_they_were_given() -> None:
    with pytest.raises(ValueError, match=r"^Mamba3: cu_seqlens: got 9 for the end of row 0, expected at most the 4"):
        small()(torch.zeros(4, 4).double(), cu_seqlens=torch.tensor([0, 9]))


@pytest.mark.parametrize("number", [0, 3])
def test_a_rank_of_which_one_is_used_is_one_input_and_output(number: int) -> None:
    """A rank of which all but one input is zero, and one output is read, is one input and output."""
    sample = next(s for s in mamba_ops.mamba3_chunk_scan.make_samples("cpu", dtype=torch.float64) if s.name == "MIMO")
    tokens, options = list(sample.args), dict(sample.kwargs)
    rank = options["mimo_x"].shape[1]
    one = torch.zeros(rank, 1, dtype=torch.float64)
    one[number % rank] = 1
    options |= dict.fromkeys(("mimo_x", "mimo_o"), one.expand(4, rank, 8))
    options |= dict.fromkeys(("z", "mimo_z", *_CACHES, "slots", "has_initial_state"))
    alone = dict(options) | {name: options[name][:, number % rank] for name in ("B_bias", "C_bias")}
    alone |= dict.fromkeys(("mimo_x", "mimo_o"))
    pairs = [t if t.dim() < 5 else neighbours(t[:, :, number % rank]) for t in tokens[:7]]
    alone |= {name: neighbours(alone[name]) for name in ("B_bias", "C_bias")}
    with use_backend("torch"):
        got = mamba_ops.mamba3_chunk_scan(*tokens, **options)
        want = mamba_ops.mamba3_chunk_scan(*pairs, tokens[7], **alone)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


_CACHES: Sequence[str] = ("angle_state", "ssm_state", "k_state", "v_state")


def neighbours(vectors: Tensor) -> Tensor:
    """Put what MIMO turns together next to each other, as it is in SISO."""
    return vectors.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
