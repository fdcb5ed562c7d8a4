"""A wrong call: a sentence that names the argument, the same from eager and compiled code, nothing written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_ops
from mamba_ops.registry import Op, Sample
from tests.conftest import ACCELERATOR
from tests.harness import OPS, with_output

DEVICE = ACCELERATOR or torch.device("cpu")
Change = Callable[[Any], Any]

CONV: list[tuple[str, str, Change, str]] = [
    ("base", "x", lambda x: x[0], r"x: got shape \(24,\), expected \(n, dim\) or \(n, length, dim\)"),
    ("base", "x", lambda x: x.int(), "x: got int32, expected float16, bfloat16, float32 or float64"),
    (
        "base",
        "x",
        lambda x: x[:, :20],
        r"weight: got shape \(24, 4\), expected \(20, 4\); its dim is the last axis of x",
    ),
    ("packed", "x", lambda x: x[None], r"x: got shape \(1, 10, 24\), expected \(tokens, dim\); with cu_seqlens"),
    ("base", "conv_state", lambda s: s[0], r"conv_state: got shape \(24, 3\), expected \(slots, dim, state_len\)"),
    ("base", "conv_state", lambda s: s[:, :12], r"conv_state: got shape \(6, 12, 3\), expected \(6, 24, 3\)"),
    ("base", "conv_state", lambda s: s[..., :2], "conv_state: got state_len 2, expected at least 3"),
    ("base", "conv_state", lambda s: s.long(), "conv_state: got int64, expected float16"),
    ("no slots", "conv_state", lambda s: s[:2], "conv_state: got 2 slots, expected at least 4; without slots row i"),
    ("base", "weight", lambda w: w.unsqueeze(1), r"weight: got shape \(24, 1, 4\), expected \(dim, width\); squeeze"),
    ("base", "weight", lambda w: w[:, :1], "weight: got width 1, expected a width of 2 to 8"),
    ("base", "weight", lambda w: w.repeat(1, 3), "weight: got width 12, expected a width of 2 to 8"),
    ("base", "bias", lambda b: b[:4], r"bias: got shape \(4,\), expected \(24,\)"),
    ("base", "slots", lambda s: s.float(), "slots: got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "slots: got 2 rows, expected at least 4; give every row a slot"),
    (
        "base",
        "slots",
        lambda s: s[None, None],
        r"slots: got shape \(1, 1, 4\), expected \(rows,\) or \(rows, columns\)",
    ),
    ("packed", "cu_seqlens", lambda c: c[:0], r"cu_seqlens: got shape \(0,\), expected \(n \+ 1,\)"),
    ("packed", "cu_seqlens", lambda c: c.half(), "cu_seqlens: got float16, expected int32 or int64"),
    ("speculative", "num_accepted_tokens", lambda a: a[:3], r"num_accepted_tokens: got shape \(3,\), expected \(4,\)"),
    (
        "speculative",
        "num_accepted_tokens",
        lambda a: a.bool(),
        "num_accepted_tokens: got bool, expected int32 or int64",
    ),
    ("speculative", "conv_state", lambda s: s[..., :4], "conv_state: got state_len 4, expected at least 5"),
    ("base", "out", lambda o: o[:2], r"out: got shape \(2, 24\), expected \(4, 24\)"),
]
PREFILL: list[tuple[str, str, Change, str]] = [
    (
        "base",
        "x",
        lambda x: x[0],
        r"x: got shape \(6, 24\), expected \(n, length, dim\); packed sequences need cu_seqlens",
    ),
    ("base", "x", lambda x: x.int(), "x: got int32, expected float16"),
    ("base", "x", lambda x: x[..., :20], r"weight: got shape \(24, 4\), expected \(20, 4\); its dim is the last axis"),
    ("packed", "x", lambda x: x[None], r"x: got shape \(1, 51, 24\), expected \(tokens, dim\); with cu_seqlens"),
    ("base", "weight", lambda w: w.unsqueeze(1), r"weight: got shape \(24, 1, 4\), expected \(dim, width\); squeeze"),
    ("base", "weight", lambda w: w[:, :1], "weight: got width 1, expected a width of 2 to 8"),
    ("base", "weight", lambda w: w.repeat(1, 3), "weight: got width 12, expected a width of 2 to 8"),
    ("base", "bias", lambda b: b[:4], r"bias: got shape \(4,\), expected \(24,\)"),
    ("packed", "cu_seqlens", lambda c: c[:0], r"cu_seqlens: got shape \(0,\), expected \(n \+ 1,\)"),
    ("packed", "cu_seqlens", lambda c: c.half(), "cu_seqlens: got float16, expected int32 or int64"),
    ("packed", "cu_seqlens", lambda c: None, r"x: got shape \(51, 24\), expected \(n, length, dim\)"),
    ("base", "conv_state", lambda s: s[0], r"conv_state: got shape \(24, 3\), expected \(slots, dim, state_len\)"),
    ("base", "conv_state", lambda s: s[:, :12], r"conv_state: got shape \(6, 12, 3\), expected \(6, 24, 3\)"),
    ("base", "conv_state", lambda s: s[..., :2], "conv_state: got state_len 2, expected at least 3"),
    ("base", "conv_state", lambda s: s.long(), "conv_state: got int64, expected float16"),
    ("no slots", "conv_state", lambda s: s[:2], "conv_state: got 2 slots, expected at least 3; without slots sequence"),
    ("base", "conv_state", lambda s: None, "slots: got a tensor, expected None where there is no conv_state"),
    ("no slots", "conv_state", lambda s: None, "has_initial_state: got a tensor, expected None where there is no"),
    ("base", "slots", lambda s: s.float(), "slots: got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "slots: got 2 rows, expected at least 3; give every row a slot"),
    ("base", "has_initial_state", lambda k: k.int(), "has_initial_state: got int32, expected bool; compare it with 0"),
    ("base", "has_initial_state", lambda k: k[:2], r"has_initial_state: got shape \(2,\), expected \(3,\)"),
    ("base", "out", lambda o: o[:2], r"out: got shape \(2, 6, 24\), expected \(3, 6, 24\)"),
]
SSM: list[tuple[str, str, Change, str]] = [
    ("base", "state", lambda s: s[0, 0], r"state: got shape \(16, 16\), expected \(slots, dim, dstate\) or"),
    ("base", "state", lambda s: s.int(), "state: got int32, expected float16"),
    ("base", "state", lambda s: s[:, :3], r"x: got shape"),
    ("no slots", "state", lambda s: s[:1], "state: got 1 slots, expected at least"),
    ("base", "x", lambda x: x[0], r"x: got shape \(4, 16\), expected"),
    ("base", "x", lambda x: x.bool(), "x: got bool, expected float16"),
    ("base", "dt", lambda d: d[:, :2], r"dt: got shape"),
    ("base", "dt", lambda d: d.long(), "dt: got int64"),
    ("base", "A", lambda a: a[:3], r"A: got shape \(3,\), expected \(4, 16, 16\) or \(4,\)"),
    ("base", "B", lambda b: b[..., :8], r"B: got shape"),
    ("one group", "B", lambda b: b.repeat(1, 3, 1), r"C: got shape \(3, 1, 16\), expected \(3, 3, 16\); C is like B"),
    ("base", "C", lambda c: c[:1], r"C: got shape"),
    ("base", "D", lambda d: d[:2], r"D: got shape \(2,\), expected \(4, 16\) or \(4,\)"),
    ("base", "dt_bias", lambda d: d[:2], r"dt_bias: got shape \(2,\), expected \(4, 16\) or \(4,\)"),
    ("gate", "z", lambda z: z[:1], "z: got shape"),
    ("base", "slots", lambda s: s.double(), "slots: got float64, expected int32 or int64"),
    ("base", "slots", lambda s: s[:1], "slots: got 1 rows, expected at least"),
    ("write slots", "write_slots", lambda s: s[:1], "write_slots: got 1 rows, expected at least"),
    ("packed", "cu_seqlens", lambda c: c[None], r"cu_seqlens: got shape .* expected \(n \+ 1,\)"),
    ("speculative", "num_accepted_tokens", lambda a: a[:1], r"num_accepted_tokens: got shape \(1,\)"),
    ("speculative", "slots", lambda s: None, "slots: got None"),
    ("base", "out", lambda o: o[..., :1], r"out: got shape"),
    (
        "base",
        "rounding_seed",
        lambda _: torch.zeros(1, dtype=torch.int64, device=DEVICE),
        "rounding_seed: .*not implemented yet",
    ),
    (
        "base",
        "philox_rounds",
        lambda _: 7,
        "philox_rounds: got 7, expected 0; stochastic rounding is not implemented yet",
    ),
]
SSD: list[tuple[str, str, Change, str]] = [
    (
        "base",
        "x",
        lambda x: x[0],
        r"x: got shape \(20, 4, 16\), expected \(n, length, heads, dim\); packed tokens come",
    ),
    (
        "packed",
        "x",
        lambda x: x[None],
        r"x: got shape \(1, 43, 4, 16\), expected \(tokens, heads, dim\); with cu_seqlens",
    ),
    ("base", "x", lambda x: x.int(), "x: got int32, expected float16"),
    ("base", "x", lambda x: x[..., :0], r"x: got shape \(3, 20, 4, 0\), expected only tokens of size 0"),
    ("base", "dt", lambda d: d[..., :2], r"dt: got shape \(3, 20, 2\), expected \(3, 20, 4\); one step size"),
    ("base", "A", lambda a: a[:3], r"A: got shape \(3,\), expected \(4,\)"),
    ("base", "A", lambda a: a.long(), "A: got int64, expected float16"),
    ("base", "B", lambda b: b[0], r"B: got shape \(20, 2, 16\), expected like x"),
    (
        "base",
        "B",
        lambda b: b[:, :9],
        r"B: got shape \(3, 9, 2, 16\), expected \(3, 20, 2, 16\); tokens are those of x",
    ),
    ("base", "C", lambda c: c[..., :8], r"C: got shape \(3, 20, 2, 8\), expected \(3, 20, 2, 16\); C is like B"),
    ("base", "chunk_size", lambda _: 0, "chunk_size: got 0, expected a positive number of tokens"),
    ("dt limits", "dt_max", lambda _: 0.125, "dt_min: got 0.25, expected at most dt_max, which is 0.125"),
    ("base", "D", lambda d: d[:2], r"D: got shape \(2,\), expected \(4,\) or \(4, 16\)"),
    ("gate", "z", lambda z: z[:1], r"z: got shape \(1, 20, 4, 16\), expected \(3, 20, 4, 16\); z is like x"),
    ("base", "dt_bias", lambda d: d[:2], r"dt_bias: got shape \(2,\), expected \(4,\)"),
    ("packed", "cu_seqlens", lambda c: c[None], r"cu_seqlens: got shape \(1, 4\), expected \(n \+ 1,\)"),
    ("absolute chunks", "computed_tokens", lambda c: c[:2], r"computed_tokens: got shape \(2,\), expected \(3,\)"),
    ("absolute chunks", "computed_tokens", lambda c: c.bool(), "computed_tokens: got bool, expected int32 or int64"),
    (
        "base",
        "ssm_state",
        lambda s: s[0],
        r"ssm_state: got shape \(4, 16, 16\), expected \(4, 4, 16, 16\); \(slots, heads",
    ),
    ("base", "ssm_state", lambda s: s[:, :3], r"ssm_state: got shape \(8, 3, 16, 16\), expected \(8, 4, 16, 16\)"),
    ("base", "ssm_state", lambda s: s.int(), "ssm_state: got int32, expected float16"),
    (
        "no slots",
        "ssm_state",
        lambda s: s[:2],
        "ssm_state: got 2 slots, expected at least 3; without slots, row i uses",
    ),
    ("initial states", "ssm_state", lambda s: None, "ssm_state: got none, expected a cache; has_initial_state says"),
    ("base", "slots", lambda s: s.float(), "slots: got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "slots: got 2 rows, expected at least 3"),
    ("write slots", "write_slots", lambda s: s[:1], "write_slots: got 1 rows, expected at least 3"),
    ("initial states", "has_initial_state", lambda h: h.int(), "has_initial_state: got int32, expected bool"),
    ("initial states", "has_initial_state", lambda h: h[:2], r"has_initial_state: got shape \(2,\), expected \(3,\)"),
    ("chunk states", "chunk_states", lambda c: c[:9], "chunk_states: got 9 chunks, expected at least 10; as many"),
    (
        "chunk states",
        "chunk_states",
        lambda c: c[:, 1:],
        r"chunk_states: got shape \(10, 3, 16, 16\), expected \(10, 4",
    ),
    ("base", "out", lambda o: o[..., :1], r"out: got shape \(3, 20, 4, 1\), expected \(3, 20, 4, 16\); out is like x"),
]
TABLES = {
    mamba_ops.causal_conv1d: PREFILL,
    mamba_ops.causal_conv1d_update: CONV,
    mamba_ops.mamba_chunk_scan: SSD,
    mamba_ops.selective_state_update: SSM,
}
CASES = [
    pytest.param(op, *case, id=f"{op.name}-{i}-{case[1]}")
    for op, table in TABLES.items()
    for i, case in enumerate(table)
]


def test_every_op_is_called_wrongly() -> None:
    assert list(TABLES) == OPS


def changed(op: Op[...], sample: Sample, name: str, change: Change) -> Sample:
    """The sample with one argument changed."""
    sample = with_output(op, sample).clone()
    positional = [p.name for p in op.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    arguments = dict(zip(positional, sample.args, strict=False)) | dict(sample.kwargs)
    arguments[name] = change(arguments.get(name))
    args = tuple(arguments.pop(n) for n in positional[: len(sample.args)])
    return Sample(sample.name, args, arguments)


def assert_untouched(before: Sample, after: Sample) -> None:
    for old, new in zip((*before.args, *before.kwargs.values()), (*after.args, *after.kwargs.values()), strict=True):
        assert not isinstance(old, Tensor) or torch.equal(old, new)


@pytest.mark.parametrize(("op", "sample", "name", "change", "says"), CASES)
@pytest.mark.usefixtures("fresh_dynamo")
def test_bad_argument(op: Op[...], sample: str, name: str, change: Change, says: str) -> None:
    [good] = [s for s in op.make_samples(DEVICE) if s.name == sample]

    def run(*args: Any, **kwargs: Any) -> Tensor:
        return op(*args, **kwargs)

    messages = []
    for call in (op, torch.compile(run, fullgraph=True, backend="aot_eager")):
        bad = changed(op, good, name, change)
        before = bad.clone()
        with torch.no_grad(), pytest.raises(ValueError, match=rf"^mamba_ops::{op.name}: {says}") as error:
            call(*bad.args, **bad.kwargs)
        messages.append(str(error.value))
        assert_untouched(before, bad)
    assert messages[0] == messages[1]


def test_groups_divide_heads() -> None:
    [good] = [s for s in mamba_ops.selective_state_update.make_samples(DEVICE) if s.name == "base"]
    state, x, dt, A, B, C = good.args
    with torch.no_grad(), pytest.raises(ValueError, match=r"B: got .*3 groups.* expected .*4 heads"):
        mamba_ops.selective_state_update(state, x, dt, A, *(m.repeat(1, 2, 1)[:, :3] for m in (B, C)), **good.kwargs)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_meta_among_real_tensors(op: Op[...]) -> None:
    bad = changed(op, op.make_samples(DEVICE)[0], op.parameters[2].name, lambda t: t.to("meta"))
    with torch.no_grad(), pytest.raises(ValueError, match=f"{op.parameters[2].name}: got a tensor on meta, expected"):
        op(*bad.args, **bad.kwargs)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_slots_out_of_range_are_noticed_on_a_cpu(op: Op[...]) -> None:
    good = op.make_samples("cpu")[0]
    bad = changed(op, good, "slots", lambda slots: slots + 1000)
    before = bad.clone()
    with torch.no_grad(), mamba_ops.use_backend("torch"), pytest.raises(IndexError):
        op(*bad.args, **bad.kwargs)
    assert_untouched(before, bad)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_two_devices(op: Op[...]) -> None:
    """Also after the same call on one device was remembered."""
    good = op.make_samples(DEVICE)[0]
    copied = good.clone()
    with torch.no_grad():
        op(*copied.args, **copied.kwargs)
        for name in (op.parameters[2].name, "slots"):
            bad = changed(op, good, name, lambda t: t.cpu())
            with pytest.raises(ValueError, match=f"{name}: got cpu, expected cuda:0, where x is"):
                op(*bad.args, **bad.kwargs)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_gradients_are_refused_in_eager_and_compiled(op: Op[...]) -> None:
    """Also for a parameter, the usual way to meet this; and under no_grad the same call runs."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        return op(*args, **kwargs)

    good = op.make_samples(DEVICE)[0].clone()
    for number in (i for i, argument in enumerate(good.args) if isinstance(argument, Tensor)):
        bad = Sample(
            "grad", tuple(torch.nn.Parameter(a) if i == number else a for i, a in enumerate(good.args)), good.kwargs
        )
        before = bad.clone()
        name = op.parameters[number].name
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for call in (op, compiled):
            with pytest.raises(ValueError, match=f"^mamba_ops::{op.name}: {name}: got a tensor that requires grad"):
                call(*bad.args, **bad.kwargs)
        assert_untouched(before, bad)
        with torch.no_grad():
            compiled(*bad.clone().args, **bad.kwargs)
