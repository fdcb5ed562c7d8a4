"""The references of mamba_ssm, its minimal scan, and the pieces of its decoding: what they are documented as."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops.compat import mamba_ssm
from mamba_ops.compat.mamba_ssm import blocks, generation, minimal, norms, parts, scans
from mamba_ops.registry import use_backend
from tests.tape import Tape


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    with use_backend("torch"):  # which alone takes float64
        yield
    torch.set_default_dtype(torch.float32)


# -- the minimal scan -------------------------------------------------------------------------------------------------


def test_sums_of_segments() -> None:
    x = torch.randn(2, 5)
    sums = minimal.segsum(x)
    for row in range(2):
        for i in range(5):
            for j in range(5):
                want = -math.inf if j > i else x[row, j + 1 : i + 1].sum().item()
                assert math.isclose(sums[row, i, j].item(), want, abs_tol=1e-12)


@pytest.mark.parametrize("with_states", [False, True])
def test_the_minimal_scan_is_the_recurrence(with_states: bool) -> None:
    X, A = torch.randn(2, 12, 3, 4), -torch.rand(2, 12, 3)
    B, C = torch.randn(2, 2, 12, 3, 5)
    first = torch.randn(2, 1, 3, 4, 5) if with_states else None
    state = torch.zeros(2, 3, 4, 5) if first is None else first[:, 0]
    outs = []
    for t in range(12):
        state = state * A[:, t].exp()[..., None, None] + X[:, t].unsqueeze(-1) * B[:, t].unsqueeze(-2)
        outs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    out, last = minimal.ssd_minimal_discrete(X, A, B, C, 4, first)
    torch.testing.assert_close(out, torch.stack(outs, 1))
    torch.testing.assert_close(last, state)
    for length in (5, 24):
        with pytest.raises(ValueError, match=f"ssd_minimal_discrete: X, A: got .*in chunks of {length}"):
            minimal.ssd_minimal_discrete(X, A, B, C, length)
    with pytest.raises(ValueError, match="ssd_minimal_discrete: block_len: got 0, expected 1 at least"):
        minimal.ssd_minimal_discrete(X, A, B, C, 0)
    with pytest.raises(ValueError, match="segsum: x: got a number, expected"):
        minimal.segsum(X.sum())
    leaves = [t.requires_grad_() for t in (X, A, B, C)]
    assert torch.autograd.gradcheck(lambda *t: minimal.ssd_minimal_discrete(*t, 4, first), leaves, fast_mode=True)


# -- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_references_of_norms_take_what_is_kept(is_rms_norm: bool) -> None:
    x, x1, residual, (weight, bias) = *torch.randn(3, 4, 8), torch.randn(2, 8)
    reference = norms.rms_norm_ref if is_rms_norm else norms.layer_norm_ref
    masks = torch.rand(2, 4, 8) > 0.5
    out, total = reference(
        x, weight, bias, residual, x1, dropout_p=0.5, prenorm=True, dropout_mask=masks[0], dropout_mask1=masks[1]
    )
    torch.testing.assert_close(total, 2 * x * masks[0] + 2 * x1 * masks[1] + residual)
    torch.testing.assert_close(
        out, norms.layer_norm_fn(total, weight, bias, is_rms_norm=is_rms_norm) if is_rms_norm
        else functional.layer_norm(total, (8,), weight, bias, 1e-6),
    )  # fmt: skip
    for function, name in ((norms.layer_norm_fn, "layer_norm_fn"), (norms.layernorm_fn, "layernorm_fn")):
        with pytest.raises(ValueError, match=f"{name}: weight: got complex"):
            function(x, weight + 0j, bias)
    gated = norms.rms_norm_gated_ref(x, weight, bias, z=residual, group_size=4, norm_before_gate=False, upcast=False)
    torch.testing.assert_close(gated, norms.rmsnorm_fn(x, weight, bias, residual, 1e-6, 4, False))


def mixer_arguments() -> dict[str, Any]:
    heads, dim, groups, dstate = 4, 8, 2, 5
    channels = heads * dim + 2 * groups * dstate
    return {
        "zxbcdt": torch.randn(2, 11, heads * dim + channels + heads),
        "conv1d_weight": torch.randn(channels, 4),
        "conv1d_bias": torch.randn(channels),
        "dt_bias": torch.randn(heads),
        "A": -torch.rand(heads),
        "D": torch.randn(heads),
        "chunk_size": 4,
        "headdim": dim,
        "ngroups": groups,
    }


def test_the_reference_of_a_fused_mixer_is_the_mixer() -> None:
    arguments = mixer_arguments() | {"rmsnorm_weight": torch.randn(32), "outproj_weight": torch.randn(6, 32)}
    want = scans.mamba_split_conv1d_scan_combined(**arguments)
    torch.testing.assert_close(parts.mamba_split_conv1d_scan_ref(**arguments), want)


@pytest.mark.parametrize("gated", [False, True])
def test_the_reference_of_convolution_and_scan_is_the_mixer_between_its_projections(gated: bool) -> None:
    arguments = mixer_arguments()
    want = scans.mamba_split_conv1d_scan_combined(**arguments)
    z, xBC, dt = arguments.pop("zxbcdt").split([32, 52, 4], dim=-1)
    got = parts.mamba_conv1d_scan_ref(xBC, dt=dt, **arguments, z=z if gated else None, dt_softplus=True)
    torch.testing.assert_close(got if gated else got * functional.silu(z), want)
    with pytest.raises(ValueError, match="mamba_conv1d_scan_ref: ngroups: got 0, expected 1 at least"):
        parts.mamba_conv1d_scan_ref(xBC, dt=dt, **arguments | {"ngroups": 0})
    with pytest.raises(ValueError, match="mamba_conv1d_scan_ref: headdim: got None, expected the size of a head"):
        parts.mamba_conv1d_scan_ref(xBC, dt=dt, **arguments | {"headdim": None})


# -- decoding ---------------------------------------------------------------------------------------------------------


def test_filters_of_logits_are_in_place() -> None:
    logits = torch.log(torch.tensor([[0.05, 0.3, 0.5, 0.15]]))

    def kept(modify: Any, value: float) -> list[bool]:
        changed = logits.clone()
        assert modify(changed, value) is None
        assert torch.equal(changed[changed.isfinite()], logits[changed.isfinite()])
        return changed.isfinite().flatten().tolist()

    assert kept(generation.modify_logits_for_top_k_filtering, 2) == [False, True, True, False]
    assert kept(generation.modify_logits_for_top_p_filtering, 0.75) == [False, True, True, False]
    assert kept(generation.modify_logits_for_top_p_filtering, 1.0) == [True] * 4
    assert kept(generation.modify_logits_for_min_p_filtering, 1.0) == [True] * 4
    shares = logits.exp()
    generation.modify_logits_for_min_p_filtering(shares, 0.2)
    assert shares.isfinite().flatten().tolist() == [False, True, True, False]


def test_a_step_is_captured_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    config = mamba_ssm.MambaConfig(d_model=32, n_layer=2, vocab_size=61, ssm_cfg={"layer": "Mamba2", "headdim": 8})
    model, tokens = mamba_ssm.MambaLMHeadModel(config), torch.randint(0, 61, (2, 8))
    params = generation.InferenceParams(
        8, 2, 3, key_value_memory_dict=model.allocate_inference_cache(2, 8), lengths_per_sample=torch.zeros(2)
    )
    with pytest.raises(ValueError, match="capture_graph: model: got parameters on cpu, expected one that has graphs"):
        generation.capture_graph(model, params, 2, 8)
    tape = Tape()
    monkeypatch.setattr(generation, "graphs_of", lambda device: tape)
    run = generation.capture_graph(model, params, 2, 8)
    assert params.seqlen_offset == 3
    with torch.no_grad():
        params.seqlen_offset = 0
        model(tokens[:, :7], inference_params=params)
        got = run(tokens[:, 7:], torch.full((2, 1), 7), 7)
        torch.testing.assert_close(got, model(tokens).logits[:, 7:])
    assert (tape.records, tape.replays) == (1, 1)


def test_a_model_without_caches_says_so() -> None:
    with pytest.raises(NotImplementedError, match="allocate_inference_cache: got a GenerationMixin"):
        generation.GenerationMixin().allocate_inference_cache(1, 2)


def test_a_block_of_the_first_version_has_no_mlp() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor, inference_params: Any = None) -> Tensor:
            return 2 * x

    x = torch.randn(2, 3, 8)
    block = blocks.Block(8, lambda dim: Twice(), norm_cls=nn.Identity, residual_in_fp32=False)
    block.norm = nn.LayerNorm(8)
    out, residual = block(x)
    torch.testing.assert_close(out, 2 * functional.layer_norm(x, (8,)))
    torch.testing.assert_close(residual, x)
