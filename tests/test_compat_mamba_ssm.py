"""The parts and norms of mamba_ssm over our ops, against what their documentation says they are."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops.compat import vllm
from mamba_ops.compat.mamba_ssm import chunks, norms, parts
from mamba_ops.registry import use_backend
from tests.compat_inputs import compat, scan_arguments

PROMPT, LENGTH, CUTS = 7, 20, (0, 7, 9, 20)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    with use_backend("torch"):  # which alone takes float64
        yield
    torch.set_default_dtype(torch.float32)


# -- parts ------------------------------------------------------------------------------------------------------------


def ssd() -> dict[str, Any]:
    arguments: dict[str, Any] = scan_arguments(torch.device("cpu"))
    arguments["z"] = torch.randn_like(arguments["x"])
    return arguments | {"dt_softplus": True}


def test_the_steps_of_a_chunked_scan_are_the_scan() -> None:
    arguments = ssd()
    want = compat.mamba_chunk_scan_combined(**arguments, chunk_size=8)
    sums, dt = chunks.chunk_cumsum(arguments["dt"], arguments["A"], 8, arguments["dt_bias"], dt_softplus=True)
    x, B, C, D, z = (arguments[name] for name in "xBCDz")
    states = chunks.chunk_state(B, x, dt, sums)
    before, last = chunks.state_passing(states.flatten(-2), sums[..., -1])
    out = chunks.chunk_scan(B, C, x, dt, sums, before.unflatten(-1, states.shape[-2:]), D=D, z=z)
    torch.testing.assert_close(out, want)
    final = compat.mamba_chunk_scan_combined(**arguments, chunk_size=8, return_final_states=True)[1]
    torch.testing.assert_close(last.view_as(final), final)
    torch.testing.assert_close(parts.mamba_chunk_scan(**arguments, chunk_size=8), want)


# a sequence that ends a chunk, one within a chunk, an empty one, one over several chunks
@pytest.mark.parametrize("ends", [(0, 8, 11, 11, 13, 21), (0, 3, 21), (0, 21)])
def test_the_steps_of_a_chunked_scan_leave_the_state_of_each_sequence(ends: tuple[int, ...]) -> None:
    arguments = ssd()
    x, dt, B, C, z = (arguments[name][:1] for name in ("x", "dt", "B", "C", "z"))
    own = arguments | {"x": x, "dt": dt, "B": B, "C": C, "z": z}
    cu_seqlens = torch.tensor(ends)
    seq_idx = torch.repeat_interleave(torch.arange(len(ends) - 1), torch.diff(cu_seqlens))[None]
    packed = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
    final = compat.mamba_chunk_scan_combined(**own, chunk_size=8, **packed, return_varlen_states=True)[1]
    sums, step = chunks.chunk_cumsum(dt, arguments["A"], 8, arguments["dt_bias"], dt_softplus=True)
    left = chunks.chunk_state_fwd(B, x, step, sums, seq_idx=seq_idx)
    given = torch.empty_like(left)
    assert chunks.chunk_state_fwd(B, x, step, sums, seq_idx, states=given) is given
    torch.testing.assert_close(given, left)
    before, _ = chunks.state_passing_fwd(left.flatten(-2), sums[..., -1], seq_idx=seq_idx, chunk_size=8)
    before = before.unflatten(-1, left.shape[-2:])
    states = chunks.chunk_state_varlen(B[0], x[0], step[0], sums[0], cu_seqlens, before[0])
    torch.testing.assert_close(states, final)
    beyond = torch.tensor([*ends[:-1], 99])
    states = chunks.chunk_state_varlen(B[0], x[0], step[0], sums[0], beyond, before[0])
    torch.testing.assert_close(states, final)


def test_what_the_steps_of_a_chunked_scan_cannot_use_is_refused() -> None:
    sums, step = chunks.chunk_cumsum(torch.rand(1, 5, 2), -torch.rand(2), 4)
    B, x, left = torch.randn(1, 5, 1, 3), torch.randn(1, 5, 2, 6), torch.randn(1, 2, 2, 18)
    with pytest.raises(
        ValueError, match=r"chunk_state_fwd: seq_idx: got torch.int64 of shape \(1, 4\), expected integers"
    ):
        chunks.chunk_state_fwd(B, x, step, sums, seq_idx=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="state_passing_fwd: chunk_size: got None"):
        chunks.state_passing_fwd(left, sums[..., -1], seq_idx=torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(
        ValueError, match="state_passing_fwd: seq_idx: got 5 tokens, expected as many as 2 chunks of 8 hold"
    ):
        chunks.state_passing_fwd(left, sums[..., -1], seq_idx=torch.zeros(1, 5, dtype=torch.long), chunk_size=8)
    with pytest.raises(ValueError, match="chunk_cumsum: chunk_size: got 0"):
        chunks.chunk_cumsum(torch.rand(1, 5, 2), -torch.rand(2), 0)
    with pytest.raises(ValueError, match=r"chunk_state: dt: got shape \(1, 1, 2, 4\), expected \(1, 2, 2, 4\)"):
        chunks.chunk_state(B, x, step[:, :1], sums)
    with pytest.raises(
        ValueError, match="chunk_state: dt: got 1 chunks, expected as many chunks of 4 as 5 tokens take"
    ):
        chunks.chunk_state(B, x, step[:, :, :1], sums[:, :, :1])
    with pytest.raises(ValueError, match="chunk_scan: C: got 0 groups, expected a divisor of the 2 heads"):
        chunks.chunk_scan(B, B[:, :, :0], x, step, sums, left.unflatten(-1, (6, 3)))
    with pytest.raises(ValueError, match=r"chunk_state_varlen: cu_seqlens: got torch.float64 of shape \(2,\)"):
        chunks.chunk_state_varlen(B[0], x[0], step[0], sums[0], torch.zeros(2), left[0].unflatten(-1, (6, 3)))


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.3, 0.9)])
def test_the_recurrence_of_mamba_1_gives_the_scan_of_mamba_2(limit: tuple[float, float]) -> None:
    arguments = ssd()
    want = compat.mamba_chunk_scan_combined(**arguments, chunk_size=8, dt_limit=limit)
    torch.testing.assert_close(parts.ssd_selective_scan(**arguments, dt_limit=limit), want)
    expanded = arguments | {
        "dt": arguments["dt"].unsqueeze(-1).repeat(1, 1, 1, 8),
        "A": arguments["A"].view(-1, 1, 1).expand(4, 8, 16).flatten(0, 1),
        "D": arguments["D"].unsqueeze(1).repeat(1, 8),
        "dt_bias": arguments["dt_bias"].unsqueeze(1).repeat(1, 8),
    }
    torch.testing.assert_close(parts.ssd_selective_scan(**expanded, dt_limit=limit), want)


@pytest.mark.parametrize("of", [("B",), ("C",), ("B", "C"), ("groups",)])
def test_a_scan_takes_what_is_of_channels(of: tuple[str, ...]) -> None:
    u, delta = torch.randn(2, 6, 9), torch.rand(2, 6, 9)
    A, leaves = -torch.rand(6, 4), {}
    tokens = {name: torch.randn(2, 4, 9) for name in "BC"}
    for name in of:
        if name == "groups":
            tokens["B"] = torch.randn(2, 3, 4, 9)
        else:
            leaves[name] = tokens[name] = torch.randn(6, 4, requires_grad=True)
    full = {
        n: t.unsqueeze(-1).expand(2, 6, 4, 9) if t.dim() == 2 else
        (t if t.dim() == 4 else t.unsqueeze(1)).repeat_interleave(6 // (t.shape[1] if t.dim() == 4 else 1), 1)
        for n, t in tokens.items()
    }  # fmt: skip
    out = compat.selective_scan_fn(u, delta, A, **tokens)
    torch.testing.assert_close(out, compat.selective_scan_fn(u, delta, A, **full))
    for leaf in leaves.values():
        assert torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0].abs().min() > 0


def test_a_scan_keeps_packed_sequences_apart() -> None:
    """Eager, in a graph, and the states of all."""
    u, delta, z = torch.randn(1, 6, LENGTH), torch.randn(1, 6, LENGTH), torch.randn(1, 6, LENGTH)
    A, B, C = -torch.rand(6, 4), torch.randn(1, 4, LENGTH), torch.randn(1, 4, LENGTH)
    options: dict[str, Any] = {"D": torch.randn(6), "delta_bias": torch.randn(6), "delta_softplus": True}
    alone = [
        compat.selective_scan_fn(
            *(t[..., a:b] for t in (u, delta)), A, *(t[..., a:b] for t in (B, C)), z=z[..., a:b], **options,
            return_last_state=True,
        )
        for a, b in itertools.pairwise(CUTS)
    ]  # fmt: skip
    want, states = torch.cat([out for out, _ in alone], -1), torch.cat([last for _, last in alone])
    ends, idx = torch.tensor(CUTS), torch.repeat_interleave(torch.arange(3), torch.tensor([7, 2, 11]))[None]

    def call(**packed: Any) -> Any:
        return compat.selective_scan_fn(u, delta, A, B, C, z=z, **options, **packed)

    torch.testing.assert_close(call(seq_idx=idx), want)
    torch.testing.assert_close(call(cu_seqlens=ends, return_varlen_states=True), (want, states))
    torch.testing.assert_close(call(cu_seqlens=ends, return_last_state=True), (want, states[-1:]))
    graph = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(seq_idx=idx, return_last_state=True), (want, states[-1:]))


@pytest.mark.parametrize("rms", [False, True])
def test_the_inner_function_is_its_parts(rms: bool) -> None:
    xz, conv, bias = torch.randn(2, 12, 9), torch.randn(6, 1, 4), torch.randn(6)
    x_proj, dt_proj, out_proj = torch.randn(3 + 8, 6), torch.randn(6, 3), torch.randn(5, 6)
    A, D, dt_bias = -torch.rand(6, 4), torch.randn(6), torch.randn(6)
    weights = {"b_rms_weight": torch.randn(4), "c_rms_weight": torch.randn(4), "dt_rms_weight": torch.randn(6)}
    biases = {"B_proj_bias": torch.randn(4), "C_proj_bias": torch.randn(4)}
    got = parts.mamba_inner_fn(
        xz, conv, bias, x_proj, dt_proj, out_proj, None, A, None, None, D, dt_bias, **biases, **(weights if rms else {})
    )
    x, z = xz.chunk(2, 1)
    x = compat.causal_conv1d_fn(x, conv[:, 0], bias, activation="silu")
    dt, B, C = (x.transpose(1, 2) @ x_proj.t()).split([3, 4, 4], -1)
    dt, B, C = dt @ dt_proj.t(), B + biases["B_proj_bias"], C + biases["C_proj_bias"]
    if rms:
        dt, B, C = (
            functional.rms_norm(t, t.shape[-1:], w, 1e-6)
            for t, w in zip((dt, B, C), (weights[f"{n}_rms_weight"] for n in ("dt", "b", "c")), strict=True)
        )
    y = compat.selective_scan_fn(x, *(dt.mT, A, B.mT, C.mT), D, z=z, delta_bias=dt_bias, delta_softplus=True)
    torch.testing.assert_close(got, y.mT @ out_proj.t())


@pytest.mark.parametrize("given", ["B", "C", "BC"])
def test_the_inner_function_projects_what_is_not_given(given: str) -> None:
    """B and C of channels, or of tokens, have no rows in the projection."""
    xz, conv, bias = torch.randn(2, 12, 9), torch.randn(6, 1, 4), torch.randn(6)
    dt_proj, out_proj = torch.randn(6, 3), torch.randn(5, 6)
    A, dt_bias = -torch.rand(6, 4), torch.randn(6)
    own = {"B": torch.randn(6, 4), "C": torch.randn(2, 4, 9)}
    x_proj = torch.randn(3 + 4 * (2 - len(given)), 6)
    options = {name: own[name] for name in given}
    got = parts.mamba_inner_fn(xz, conv, bias, x_proj, dt_proj, out_proj, None, A, **options, delta_bias=dt_bias)
    x, z = xz.chunk(2, 1)
    x = compat.causal_conv1d_fn(x, conv[:, 0], bias, activation="silu")
    dt, *projected = (x.transpose(1, 2) @ x_proj.t()).split([3, *[4] * (2 - len(given))], -1)
    B, C = (own[name] if name in given else projected.pop().mT for name in "BC")
    y = compat.selective_scan_fn(x, (dt @ dt_proj.t()).mT, A, B, C, z=z, delta_bias=dt_bias, delta_softplus=True)
    torch.testing.assert_close(got, y.mT @ out_proj.t())
    with pytest.raises(ValueError, match=r"mamba_inner_fn: x_proj_weight: got \d+ rows, expected \d+: the step's rank"):
        parts.mamba_inner_fn(xz, conv, bias, torch.randn(5, 6), dt_proj, out_proj, None, A, **options)
    with pytest.raises(ValueError, match=r"mamba_inner_fn: xz: got shape \(\d+, \d+\), expected \(batch, 2 \* dim, le"):
        parts.mamba_inner_fn(xz[0], conv, bias, x_proj, dt_proj, out_proj, None, A, **options)


# -- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("more", [(), ("residual",), ("residual", "x1"), ("weight1", "bias1"), ("rowscale",)])
def test_layer_norm_adds_and_normalises(is_rms_norm: bool, more: tuple[str, ...]) -> None:
    shapes = {"weight1": (8,), "bias1": (8,), "rowscale": (2, 5)}
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(8), torch.randn(8)
    given: dict[str, Any] = {name: torch.randn(shapes.get(name, (2, 5, 8))) for name in more}
    total = x * given["rowscale"].unsqueeze(-1) if "rowscale" in given else x
    total = total + given.get("x1", 0) + given.get("residual", 0)
    centred = total if is_rms_norm else total - total.mean(-1, keepdim=True)
    normal = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-3)
    want = [normal * weight + bias]
    if "weight1" in given:
        want.append(normal * given["weight1"] + given["bias1"])
    got = norms.layer_norm_fn(x, weight, bias, eps=1e-3, is_rms_norm=is_rms_norm, prenorm=True, **given)
    torch.testing.assert_close(got, (*want, total))
    got = norms.layer_norm_fn(x, weight, bias, eps=1e-3, is_rms_norm=is_rms_norm, **given)
    torch.testing.assert_close(got, want[0] if len(want) == 1 else tuple(want))
    if is_rms_norm:
        torch.testing.assert_close(norms.rms_norm_fn(x, weight, bias, eps=1e-3, **given), got)


def test_layer_norm_drops_and_keeps_dtypes() -> None:
    x, weight = torch.ones(50, 64, dtype=torch.bfloat16), torch.ones(64)
    out, total, mask, none = norms.layer_norm_fn(
        x, weight, None, dropout_p=0.25, prenorm=True, residual_in_fp32=True, return_dropout_mask=True
    )
    assert (out.dtype, total.dtype, none) == (torch.bfloat16, torch.float32, None)
    assert 0.7 < mask.double().mean() < 0.8
    torch.testing.assert_close(total, mask.float() / 0.75)
    assert norms.rms_norm_fn(x, weight, None, residual=x.double(), prenorm=True)[1].dtype == torch.float64
    with pytest.raises(ValueError, match="layer_norm_fn: rowscale: got a tensor and x1, expected one of the two"):
        norms.layer_norm_fn(x, weight, None, x1=x, rowscale=x[:, 0])
    projected, total = norms.layer_norm_linear_fn(x.double(), weight, None, torch.eye(64), None, prenorm=True)
    torch.testing.assert_close(projected, norms.layer_norm_fn(x.double(), weight, None))
    module = norms.RMSNorm(64, dropout_p=0.5)
    assert (module(x) == 0).any()
    assert not (module.eval()(x) == 0).any()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", [norms.LayerNormGated, norms.RMSNormGated])
def test_gated_norms(kind: type[nn.Module], before: bool) -> None:
    x, z = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    module: Any = kind(12, eps=1e-3, group_size=4, norm_before_gate=before)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    h = (x if before else x * functional.silu(z)).unflatten(-1, (3, 4))
    if kind is norms.LayerNormGated:
        h = h - h.mean(-1, keepdim=True)
    h = (h / torch.sqrt(h.square().mean(-1, keepdim=True) + 1e-3)).flatten(-2) * module.weight
    h = h + (0 if module.bias is None else module.bias)
    torch.testing.assert_close(module(x, z), h * functional.silu(z) if before else h)
    assert module(x).shape == x.shape
    with pytest.raises(ValueError, match="group_size: got 5, expected a divisor of 12"):
        kind(12, group_size=5)(x)
    gate, value = torch.randn(2, 3, 8).chunk(2, -1)
    torch.testing.assert_close(norms.swiglu(torch.cat((gate, value), -1)), functional.silu(gate) * value)


@pytest.mark.parametrize("scan", [compat.selective_scan_fn, vllm.selective_scan_fn, parts.selective_scan_ref])
def test_a_flag_that_is_none_is_refused_by_the_name_it_was_given_by(scan: Callable[..., Tensor]) -> None:
    x, A, B = torch.randn(1, 4, 6), -torch.rand(4, 3), torch.randn(1, 3, 6)
    state = (torch.zeros(1, 4, 3),) if scan is vllm.selective_scan_fn else ()
    expected = rf"^{scan.__name__}: delta_softplus: got -0.0, expected True or False"
    with pytest.raises(TypeError, match=expected):
        scan(x, *state, x.clone(), A, B, B, delta_softplus=-0.0)
