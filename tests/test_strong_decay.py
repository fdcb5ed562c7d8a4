"""Every op that has a decay gives the recurrence's results however strong it is, down to a decay of zero.

Every row and head of a call has decays of its own, and is compared with float64 relative to its own largest value.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops.ops._common.decay import limited
from mamba_ops.ops._common.delta_rule_update import softplus
from mamba_ops.ops._common.samples import SampleTensors
from mamba_ops.registry import Op, Sample
from mamba_ops.testing.judge import front_on, refusal, results, with_output
from tests.conftest import ACCELERATOR
from tests.harness import OPS, backends_here, expected, judge

DEVICE = ACCELERATOR or torch.device("cpu")
LENGTH, HEADS, GROUPS, SIZE = 75, 4, 2, 16  # two chunks of the gated delta rule
POSITIONS = (0, 15, 16, 40, 63, 64, LENGTH - 1)  # ends of parts of 16, of chunks of 64, of the row
EXTREMES = (-90.0, -1e3, -1e4, -1e6, -1e8, -math.inf)


def weak(count: int) -> Tensor:
    """Logarithms of ordinary decays: the last token still knows the first."""
    return -0.05 * torch.rand(count, LENGTH, generator=torch.Generator().manual_seed(0))


def one_extreme() -> Tensor:
    """Each value at each position, once."""
    cases = [(value, position) for value in EXTREMES for position in POSITIONS]
    logs = weak(len(cases) + -len(cases) % HEADS)
    for sequence, (value, position) in zip(logs, cases, strict=False):
        sequence[position] = value
    return logs


def several_extremes() -> Tensor:
    """A few in a row, at the ends of a part, one in every few, and so many that their sum is large."""
    logs = weak(4)
    logs[0, 20:23] = -torch.inf
    logs[1, [0, 15, 16, 17, 63, 64]] = torch.tensor([-1e6, -1e3, -math.inf, -1e8, -1e4, -90.0])
    logs[2, ::9] = -1e7
    logs[3, :50] = -torch.inf
    return logs


def mixtures() -> Tensor:
    """Any powers of ten; all tokens, a few, a few of them endless, and decays whose sums are large alone."""
    generator = torch.Generator().manual_seed(1)
    powers = -(10.0 ** torch.randint(0, 9, (3, LENGTH), generator=generator))
    share = torch.tensor([1.0, 0.2, 0.2]).unsqueeze(1)
    logs = weak(4)
    logs[:3] = torch.where(torch.rand(3, LENGTH, generator=generator) < share, powers, logs[:3])
    logs[2] = torch.where(logs[2] < -1e4, -torch.inf, logs[2])
    logs[3] = torch.where(torch.rand(LENGTH, generator=generator) < 0.5, -70.0, logs[3])
    return logs


LOG_DECAYS: dict[str, tuple[Callable[[], Tensor], float]] = {
    "one extreme": (one_extreme, 1e-5),
    "several extremes": (several_extremes, 1e-5),
    "mixtures": (mixtures, 1e-5),
}
"""What makes the logarithms, (sequences, LENGTH), and the error allowed."""


def delta_rule(op: Op[...], logs: Tensor, dtype: torch.dtype) -> Sample:
    """A call of the gated delta rule with logs (rows, LENGTH, heads)."""
    make, lead = SampleTensors(DEVICE, dtype), logs.shape[:2]
    q, k, v = (make.normal(*lead, heads, SIZE) for heads in (GROUPS, GROUPS, HEADS))
    state, beta = make.normal(len(logs), HEADS, SIZE, SIZE, dtype=torch.float32), make.normal(*lead, HEADS).sigmoid()
    if "kda" in op.name:  # every channel of a key by its own decay
        logs = logs.unsqueeze(-1) * 2.0 ** -(torch.arange(SIZE, device=DEVICE) % 4)
    if op.name.endswith("_update"):
        return Sample(op.name, (state, q, k, v), {"g": logs, "beta": beta, "qk_l2norm": True})
    return Sample(op.name, (q, k, v, logs, beta), {"ssm_state": state, "qk_l2norm": True, **initial(len(logs))})


def state_space(op: Op[...], logs: Tensor, dtype: torch.dtype, A: float = -1.0) -> Sample:
    """A call of an op with A and dt, for logs (rows, LENGTH, heads); a head is a channel to Mamba-1's.

    Tokens are the smaller, the larger their steps, so that none is all that counts. With A = -inf steps are 0 or 1.
    """
    make, lead = SampleTensors(DEVICE, dtype), logs.shape[:2]
    dt = (-logs).clamp(max=1e30) if math.isfinite(A) else (logs < -1).to(torch.float32)
    of_head = () if op.name == "selective_scan" else (SIZE,)
    x = make.normal(*lead, HEADS, *of_head, dtype=torch.float32)
    x = (x / dt.clamp(min=1).view(*dt.shape, *[1] * len(of_head))).to(dtype)
    rates = torch.full((HEADS,) if of_head else (HEADS, SIZE), A, device=DEVICE)
    state = make.normal(len(logs), HEADS, *of_head, SIZE, dtype=torch.float32)
    B, C = make.normal(*lead, GROUPS, SIZE), make.normal(*lead, GROUPS, SIZE)
    if op.name == "selective_state_update":
        return Sample(op.name, (state, x, dt, rates, B, C))
    chunk_size = (64,) if op.name == "mamba_chunk_scan" else ()
    return Sample(op.name, (x, dt, rates, B, C, *chunk_size), {"ssm_state": state, **initial(len(logs))})


def initial(rows: int) -> dict[str, Tensor]:
    """Every second row goes on from a state."""
    return {"has_initial_state": torch.arange(rows, device=DEVICE) % 2 == 0}


CALLS: dict[str, Callable[..., Sample]] = {
    "chunk_gated_delta_rule": delta_rule,
    "chunk_kda": delta_rule,
    "gated_delta_rule_update": delta_rule,
    "kda_update": delta_rule,
    "mamba_chunk_scan": state_space,
    "selective_scan": state_space,
    "selective_state_update": state_space,
}
CHUNKED = ("chunk_gated_delta_rule", "chunk_kda", "mamba_chunk_scan")


def by_heads(logs: Tensor) -> Tensor:
    """(sequences, LENGTH) as (rows, LENGTH, heads)."""
    return logs.unflatten(0, (-1, HEADS)).transpose(1, 2).contiguous().to(DEVICE)


def pairs(names: Sequence[str]) -> list[Any]:
    """Every one of these ops with each of its backends here."""
    ops = [op for op in OPS if op.name in names]
    return [pytest.param(op, b, id=f"{op.name}-{b}") for op in ops for b in backends_here(op, DEVICE)]


def interpreted_token_by_token(op: Op[...], backend: str, kind: str) -> bool:
    """Whether a call takes Triton's interpreter half a minute, and its kernel no sums, which could go wrong."""
    return ACCELERATOR is None and backend == "triton" and op.name not in CHUNKED and kind == "one extreme"


def assert_near(op: Op[...], backend: str, sample: Sample, allowed: float) -> None:
    """Raise AssertionError unless each row and head is right, relative to its own largest value."""
    if why := refusal(op, backend, sample):
        pytest.skip(why)
    sample = with_output(op, sample)
    run = sample.clone()
    front_on(op, backend)(*run.args, **run.kwargs)
    left = results(op, run)
    truths = {name: truth for name, truth in expected(op, sample, torch.float64).items() if name in left}
    assert "output" in truths
    for name, truth in truths.items():
        got = left[name].cpu().double()
        if name == "output":  # tokens last
            got, truth = (t.movedim(1, -1) for t in (got, truth))
        got, truth = (t.flatten(2) for t in (got, truth))
        error = (got - truth).abs().amax(2) / truth.abs().amax(2)
        assert (error < allowed).all(), f"{name}: {error}"  # NaN is not


@pytest.mark.parametrize(
    ("op", "backend", "kind"),
    [
        pytest.param(
            *pair.values,
            kind,
            id=f"{pair.id}-{kind}",
            marks=pytest.mark.slow if interpreted_token_by_token(*pair.values, kind) else (),
        )
        for pair in pairs(list(CALLS))
        for kind in LOG_DECAYS
    ],
)
def test_it_is_the_recurrence(op: Op[...], backend: str, kind: str) -> None:
    logs, allowed = LOG_DECAYS[kind]
    assert_near(op, backend, CALLS[op.name](op, by_heads(logs()), torch.float32), allowed)


@pytest.mark.parametrize(("op", "backend"), pairs([name for name, call in CALLS.items() if call is state_space]))
def test_a_step_of_zero_decays_nothing(op: Op[...], backend: str) -> None:
    """At A = -inf too, where every other step forgets all."""
    assert_near(op, backend, state_space(op, by_heads(several_extremes()), torch.float32, A=-math.inf), 1e-5)


@pytest.mark.parametrize(("op", "backend"), pairs(["gated_delta_rule_update", "kda_update"]))
def test_a_gate_of_zero_decays_nothing_at_any_rate(op: Op[...], backend: str) -> None:
    """From a, b, A_log and dt_bias, too."""
    sample = delta_rule(op, torch.zeros(1, 3, HEADS, device=DEVICE), torch.float32)
    if why := refusal(op, backend, sample):
        pytest.skip(why)
    a, b, bias = (torch.zeros_like(t) for t in (sample.kwargs["g"], sample.kwargs["beta"], sample.kwargs["g"][0, 0]))
    raw = {"a": a - 1e4, "b": b, "A_log": b[0, 0] + math.inf, "dt_bias": bias, "qk_l2norm": True}
    runs = [sample.clone(), sample.clone()]
    given = front_on(op, backend)(*runs[0].args, **runs[0].kwargs | {"beta": b + 0.5})
    made = front_on(op, backend)(*runs[1].args, **raw)
    torch.testing.assert_close(made, given)
    torch.testing.assert_close(runs[1].args[0], runs[0].args[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("op", "backend"), pairs(CHUNKED))
def test_packed_rows_are_within_the_budget(op: Op[...], backend: str, dtype: torch.dtype) -> None:
    """The first row is shorter, so that chunks hold other tokens."""
    logs = by_heads(torch.cat([several_extremes(), mixtures()]))
    whole = CALLS[op.name](op, logs, dtype)
    rows = len(logs)

    def pack(value: Any) -> Any:
        of_tokens = isinstance(value, Tensor) and value.shape[:2] == logs.shape[:2]
        return value.flatten(0, 1)[7:] if of_tokens else value

    ends = torch.arange(1, rows + 1, dtype=torch.int32, device=DEVICE) * LENGTH - 7
    packed = {**whole.kwargs, "cu_seqlens": torch.cat([ends.new_zeros(1), ends])}
    if refusal(op, backend, sample := Sample("packed", tuple(map(pack, whole.args)), packed)):
        pytest.skip(f"{backend} does not take it")
    judge(op, sample, front_on(op, backend))


@pytest.mark.parametrize(("op", "backend"), pairs(CHUNKED))
def test_nan_is_no_decay_of_zero(op: Op[...], backend: str) -> None:
    sample = CALLS[op.name](op, by_heads(weak(HEADS)), torch.float32)
    decays = sample.args[3] if "g" in op.bind(sample.args, sample.kwargs) else sample.args[2]
    decays.view(-1)[-1] = math.nan  # of the last token, or of all: one head's
    out = front_on(op, backend)(*sample.args, **sample.kwargs)
    assert out[0, -1, -1].isnan().all()
    assert sample.kwargs["ssm_state"][0, -1].isnan().all()


def test_at_a_limit_itself_the_gradient_passes():
    """As in the ops' backwards; that of torch.clamp does up to torch 2.13."""
    values = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0, math.nan], requires_grad=True)
    with torch.enable_grad():
        found = limited(values, 0.0, 2.0)
        (gradient,) = torch.autograd.grad(found.sum(), values)
    torch.testing.assert_close(found, values.detach().clamp(0, 2), equal_nan=True)
    assert gradient.tolist() == [0, 1, 1, 1, 0, 1]
    with torch.enable_grad():
        step = torch.tensor([19.5, 20.0, 20.5], requires_grad=True)
        (gradient,) = torch.autograd.grad(softplus(step).sum(), step)
    torch.testing.assert_close(gradient, torch.ones(3))
