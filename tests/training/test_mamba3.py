"""Gradients of Mamba-3's recurrence: `functional.mamba3_chunk_scan`, whose states have some, and the op without caches.

They are those of the ops that it is composed of, so what is tested here is the composition.
"""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mamba_ops import functional
from mamba_ops.ops import mamba3_chunk_scan, mamba3_state_update
from mamba_ops.ops.mamba3_chunk_scan import training
from mamba_ops.registry import record_selections
from tests.test_mutants import changed, load
from tests.training.mamba3 import STATES, Call, calls, differentiated, judge, leaves_of, run, weights_of

SMALL = {"heads": 2, "dim": 3, "dstate": 4, "groups": 1, "angles": 1, "chunk_size": 2, "rank": 2}
NAMES = [name for name, _ in calls()]
DAILY = ("base", "packed, empty rows", "everything", "MIMO, packed, outputs of the rank")


def call_named(name: str, **sizes: Any) -> Call:
    return next(call for other, call in calls(**sizes) if other == name)


def is_slow(name: str, dtype: torch.dtype) -> bool:
    return dtype != torch.bfloat16 and name not in DAILY


def not_judged(name: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The gradients that no budget holds, as docs/training.md says: what goes into the scan is divided by dt * A, and
    steps below 2^-66 have none by way of the decay.
    """
    if name == "tiny steps":
        return "grad_A", "grad_dt"
    return ("grad_A",) if dtype == torch.float32 else ()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{dtype}", marks=[pytest.mark.slow] * is_slow(name, dtype))
        for name in NAMES
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    ],
)
def test_against_the_oracle(name: str, dtype: torch.dtype) -> None:
    judge(call_named(name, dtype=dtype), without=not_judged(name, dtype))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "odd chunks"))
        for name in ("odd chunks", "base", "packed, empty rows", "everything", "MIMO")
    ],
)
def test_against_the_oracle_on_triton(name: str) -> None:
    pytest.importorskip("triton")
    call = call_named(name, dtype=torch.float32)
    judge(call, "triton", without=("grad_A",))


@pytest.mark.parametrize("name", ["base", "gate", "packed, empty rows", "MIMO", "MIMO, packed, outputs of the rank"])
def test_by_finite_differences(name: str) -> None:
    call = call_named(name, dtype=torch.float64, state_dtype=torch.float64, **SMALL)
    call = {
        n: v.double().nan_to_num(0.5) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in call.items()
    }
    leaves = leaves_of(call)

    def outcome(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(run({**call, **dict(zip(leaves, values, strict=True))}).values())

    inputs = [leaf.requires_grad_() for leaf in leaves.values()]
    # what is turned is summed as whole numbers: far finer than the step of the differences
    assert torch.autograd.gradcheck(outcome, inputs, eps=1e-4, atol=1e-5, rtol=1e-4, fast_mode=True)


def row_of(call: Call, row: int) -> Call:
    """One row of a call, packed where it was."""
    ends, x = call["cu_seqlens"], call["x"]
    alone = dict(call) | {"cu_seqlens": None if ends is None else ends[row : row + 2] - ends[row]}
    for name, value in leaves_of(call).items():
        if name in STATES or (ends is None and value.shape[:2] == x.shape[:2]):
            alone[name] = value[row : row + 1]
        elif ends is not None and value.shape[0] == x.shape[0]:
            alone[name] = value[int(ends[row]) : int(ends[row + 1])]
    return alone


@pytest.mark.parametrize(
    "name", ["base", "MIMO", "packed, empty rows", "everything", "MIMO, packed, outputs of the rank"]
)
def test_rows_have_the_same_bits_again_and_alone(name: str) -> None:
    """Results and gradients, of states too; but for the gradients of parameters, which sum over the rows."""
    call = call_named(name)
    weights, ends = weights_of(call), call["cu_seqlens"]
    first, again = (differentiated(run, call, weights) for _ in range(2))
    assert first
    assert all(torch.equal(first[n], again[n]) for n in first)
    for row in range(call["x"].shape[0] if ends is None else ends.shape[0] - 1):
        alone = row_of(call, row)

        def of_row(name: str, value: Tensor, row: int = row) -> Tensor:
            if ends is None or name.removeprefix("grad_") in STATES:
                return value[row : row + 1]
            return value[int(ends[row]) : int(ends[row + 1])]

        mine = {n: of_row(n, w) for n, w in weights.items()}
        found = differentiated(run, alone, mine)
        compared = [
            n for n in found if n in mine or alone[n.removeprefix("grad_")] is not call[n.removeprefix("grad_")]
        ]
        assert len(compared) > len(weights)
        for n in compared:
            assert torch.equal(found[n], of_row(n, first[n])), n


def test_a_row_that_is_no_number_spoils_itself_alone() -> None:
    call = call_named("packed, initial states")
    weights, ends = weights_of(call), call["cu_seqlens"]
    spoiled = {n: v.clone() if isinstance(v, Tensor) else v for n, v in call.items()}
    for name, value in leaves_of(spoiled).items():
        if name in STATES:
            value[0] = torch.nan
        elif value.shape[0] == call["x"].shape[0]:
            value[int(ends[1]) - 1] = torch.nan
    right, wrong = (differentiated(run, c, weights) for c in (call, spoiled))
    for name in right:
        if name.removeprefix("grad_") in STATES:
            assert torch.equal(wrong[name][1:], right[name][1:]), name
        elif right[name].shape[0] == call["x"].shape[0]:
            assert torch.equal(wrong[name][int(ends[1]) :], right[name][int(ends[1]) :]), name
    assert wrong["grad_x"].isnan().any()


@pytest.mark.parametrize("name", ["base", "MIMO"])
def test_two_halves_are_the_whole(name: str) -> None:
    """The final states of the first half as initial states of the second: their gradients go through."""
    call = call_named(name, dtype=torch.float64, state_dtype=torch.float64)
    call |= {"angle_state": call["angle_state"].double()}
    of_tokens = call["x"].shape[:2]

    def part(call: Call, tokens: slice) -> Call:
        own = {n for n, v in leaves_of(call).items() if n not in STATES and v.shape[:2] == of_tokens}
        return {n: v[:, tokens] if n in own else v for n, v in call.items()}

    def halves(call: Call) -> dict[str, Tensor]:
        first = run(part(call, slice(0, 7)))
        second = run(part(call, slice(7, None)) | {n: first[n] for n in STATES})
        return second | {"output": torch.cat((first["output"], second["output"]), 1)}

    weights = weights_of(call)
    whole, twice = (differentiated(f, call, weights) for f in (run, halves))
    for name, got in twice.items():
        torch.testing.assert_close(got, whole[name], msg=name)


@pytest.mark.parametrize("name", ["gate", "MIMO", "packed, initial states", "no rows", "rows of no token"])
def test_calls_that_record_nothing_are_the_op(name: str) -> None:
    call = call_named(name, dtype=torch.float64, state_dtype=torch.float64)
    before = {n: call[n].clone() for n in STATES if call[n] is not None}
    with torch.no_grad(), record_selections() as runs:
        alone = run(call)
    assert [r.op for r in runs if r.op != "mamba_ops::mamba_chunk_scan"] == ["mamba_ops::mamba3_chunk_scan"]
    assert all(torch.equal(call[n], state) for n, state in before.items())
    recorded = run({n: v.requires_grad_() if n in leaves_of(call) else v for n, v in call.items()})
    for name, value in recorded.items():
        torch.testing.assert_close(value.detach(), alone[name], msg=name)
        assert value.requires_grad


@pytest.mark.parametrize(
    ("x", "more"), [((0, 5), {}), ((2, 0), {}), ((5,), {"cu_seqlens": [0]}), ((0,), {"cu_seqlens": [0, 0, 0]})]
)
def test_without_tokens_states_go_through(x: tuple[int, ...], more: dict[str, list[int]]) -> None:
    rows = len(more["cu_seqlens"]) - 1 if more else x[0]
    given = {n: torch.randn(*x, *size) for n, size in {"x": (2, 3), "B": (1, 4), "C": (1, 4), "angles": (2,)}.items()}
    given |= {n: torch.randn(*x, 2) for n in ("dt", "A", "trap")} | {n: torch.tensor(v) for n, v in more.items()}
    states = [torch.randn(rows, *size, requires_grad=True) for size in ((2, 2), (2, 3, 4), (2, 4), (2, 3))]
    leaves = [value.requires_grad_() for n, value in given.items() if n != "cu_seqlens"]
    y, final = functional.mamba3_chunk_scan(**given, chunk_size=4, initial_states=states)
    assert y.shape == (*x, 2, 3)
    assert not y.any()
    assert all(torch.equal(new, old) for new, old in zip(final, states, strict=True))
    found = torch.autograd.grad(y.sum() + sum((s * s).sum() for s in final), [*leaves, *states])
    assert not any(gradient.any() for gradient in found[: len(leaves)])
    assert all(torch.equal(g, 2 * s) for g, s in zip(found[len(leaves) :], states, strict=True))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("packed", "rank"),
    [
        pytest.param(packed, rank, id=f"{'packed' if packed else 'dense'}-{rank}", marks=[pytest.mark.slow] * is_slow)
        for packed, rank, is_slow in ((False, (), False), (True, (2,), False), (True, (), True), (False, (2,), True))
    ],
)
def test_one_graph_each_way(packed: bool, rank: tuple[int, ...]) -> None:
    """For all lengths, with states."""

    def loss(call: Call, states: functional.Mamba3States) -> Tensor:
        y, final = functional.mamba3_chunk_scan(**call, initial_states=states)
        return y.sin().sum() + sum(state.cos().sum() for state in final)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (12, 17, 23):
        x, rows = (3 * length,) if packed else (3, length), 3
        sizes = {"x": (4, 5), "dt": (4,), "A": (4,), "trap": (4,), "angles": (2,), "z": (4, 5)}
        sizes |= {"B": (*rank, 2, 6), "C": (*rank, 2, 6)}
        call: Call = {n: torch.randn(*x, *size) for n, size in sizes.items()} | {"chunk_size": 8}
        call |= {"dt": call["dt"].sigmoid(), "A": -call["A"].exp(), "D": torch.randn(4)}
        call |= {n: torch.randn(4, *rank, 5) for n in ("mimo_x", "mimo_z", "mimo_o") if rank}
        call |= {"cu_seqlens": torch.tensor([0, 5, 5, 3 * length - 1])} if packed else {}
        shapes = (rows, 4, 2), (rows, 4, 5, 6), (rows, *rank, 4, 6), (rows, 4, 5)
        states = functional.Mamba3States(*(torch.randn(shape, requires_grad=True) for shape in shapes))
        leaves = [*(v.requires_grad_() for v in leaves_of(call).values()), *states]
        for got, truth in zip(*(torch.autograd.grad(f(call, states), leaves) for f in (compiled, loss)), strict=True):
            assert torch.equal(got, truth)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["ok"] == 1


@pytest.mark.parametrize("rank", [(), (3,)], ids=["siso", "mimo"])
@pytest.mark.parametrize("smallest", [-48.0, -44.0, -36.0, -20.0])
def test_extremes(smallest: float, rank: tuple[int, ...]) -> None:
    """Of the smallest steps among large ones, as softplus makes them, and of rates at their floor."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    logits, rates = (torch.where(normal(2, 40, 3) < 0, least, 0.0) for least in (smallest, -20.0))
    call: Call = {"x": normal(2, 40, 3, 8), "dt": logits, "A": rates, "trap": normal(2, 40, 3), "chunk_size": 8}
    call |= {"angles": normal(2, 40, 3), "B": normal(2, 40, *rank, 1, 8), "C": normal(2, 40, *rank, 1, 8)}
    call |= {n: normal(3, *rank, 8) for n in ("mimo_x", "mimo_o") if rank}
    call |= dict(
        zip(STATES, (normal(2, 3, 3), normal(2, 3, 8, 8), normal(2, *rank, 3, 8), normal(2, 3, 8)), strict=True)
    )
    call = {**dict.fromkeys(("B_bias", "C_bias", "D", "z", "mimo_x", "mimo_z", "mimo_o", "cu_seqlens")), **call}

    def positive(call: Call) -> Call:
        """As the layer makes both."""
        steps, rates = (torch.nn.functional.softplus(call[name]) for name in ("dt", "A"))
        return call | {"dt": steps, "A": -rates.clamp(min=1e-4)}

    def of_logits(call: Call) -> dict[str, Tensor]:
        return run(positive(call))

    weights = weights_of(positive(call))
    exact = {n: v.double() if n in leaves_of(call) else v for n, v in call.items()}
    found, truth = (differentiated(of_logits, c, weights) for c in (call, exact))
    for name, value in found.items():
        assert value.isfinite().all(), name
        if name.startswith("grad_"):
            atol = 1e-3 * float(truth[name].abs().max())
            torch.testing.assert_close(value.double(), truth[name], rtol=0, atol=atol, msg=name)


def test_steps_of_zero_have_gradients_that_are_numbers() -> None:
    call = call_named("base", dtype=torch.float32)
    call["dt"] = torch.where(torch.arange(20).view(1, 20, 1) % 3 == 0, 0.0, call["dt"])
    judge(call, without=("grad_A", "grad_dt"))
    assert differentiated(run, call, weights_of(call))["grad_dt"].isfinite().all()


def test_the_op_records_without_caches() -> None:
    for name in ("gate", "packed, no caches", "MIMO"):
        call = {n: v for n, v in call_named(name).items() if n not in STATES}
        leaves = [v.nan_to_num_().requires_grad_() for v in leaves_of(call).values()]
        y, own = functional.mamba3_chunk_scan(**call)[0], mamba3_chunk_scan(**call)
        assert torch.equal(y, own)
        for got, truth in zip(*(torch.autograd.grad(v.float().sum(), leaves) for v in (own, y)), strict=True):
            assert torch.equal(got, truth)
        with pytest.raises(
            ValueError, match=r"x: got a tensor that .* for gradients of states call mamba_ops.functional"
        ):
            mamba3_chunk_scan(**call, out=torch.empty_like(y))
    sample = mamba3_state_update.make_samples("cpu")[0]
    sample.args[4].requires_grad_()
    with pytest.raises(ValueError, match=r"x: got .* mamba_ops.functional.mamba3_chunk_scan does"):
        mamba3_state_update(*sample.args, **sample.kwargs)


def test_under_torch_func() -> None:
    call = {n: v for n, v in call_named("gate", dtype=torch.float64).items() if n not in STATES}
    for function in (mamba3_chunk_scan, lambda **call: functional.mamba3_chunk_scan(**call)[0]):
        gradient = torch.func.grad(lambda x, f=function: f(**call | {"x": x}).sin().sum())(call["x"])
        x = call["x"].clone().requires_grad_()
        assert torch.equal(gradient, torch.autograd.grad(function(**call | {"x": x}).sin().sum(), x)[0])
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(lambda x, f=function: f(**call | {"x": x}), (call["x"],), (call["x"],))


@pytest.mark.parametrize("records", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("dt", lambda t: t[..., :1], r"dt: got shape \(3, 20, 1\), expected \(3, 20, 4\)"),
        ("D", lambda t: t[:2], r"D: got shape \(2,\), expected \(4,\)"),
        ("x", lambda t: None, r"x: got None, expected a torch.Tensor"),
        ("chunk_size", lambda _: 0, "chunk_size: got 0, expected 1 to 4096 tokens"),
        ("chunk_size", lambda _: 8.0, "chunk_size: got 8.0, expected a whole number"),
        ("cu_seqlens", lambda _: torch.tensor([0, 3]), r"x: got shape .* expected \(tokens, heads, dim\)"),
        (
            "initial_states",
            lambda s: s[:3],
            "initial_states: got 3 of them, expected angle_state, ssm_state, k_state, v",
        ),
        ("initial_states", lambda s: s[0], "initial_states: got a Tensor, expected angle_state"),
        ("initial_states", lambda s: (None, *s[1:]), "initial_states: angle_state: got None, expected a torch.Tensor"),
        (
            "initial_states",
            lambda s: (s[0][:2], *s[1:]),
            r"initial_states: angle_state: got shape \(2, 4, 3\), expected \(3, 4, 3\)",
        ),
        (
            "initial_states",
            lambda s: (s[0], s[1].int(), *s[2:]),
            "initial_states: ssm_state: got int32, expected float16",
        ),
    ],
)
def test_wrong_calls_are_named(name: str, wrong: Any, error: str, records: bool) -> None:
    call = call_named("base")
    given = {n: v for n, v in call.items() if n not in STATES} | {"initial_states": tuple(call[n] for n in STATES)}
    given["B"].requires_grad_(records)
    given[name] = wrong(given[name])
    with pytest.raises(ValueError, match=f"^(mamba_ops::)?mamba3_chunk_scan: {error}"):
        functional.mamba3_chunk_scan(**given)
    if name != "initial_states":
        del given["initial_states"]
        with pytest.raises(ValueError, match=f"^mamba_ops::mamba3_chunk_scan: {error}"):
            mamba3_chunk_scan(**given)


def test_rows_beyond_the_tokens_are_named_as_they_were_given() -> None:
    call = call_named("MIMO, packed, outputs of the rank")
    call["B"].requires_grad_()
    call["cu_seqlens"] = torch.tensor([0, 20, 23, 90])
    with pytest.raises(ValueError, match=r"^mamba_ops::mamba3_chunk_scan: cu_seqlens: got 90 for the end of row 2"):
        run(call)


BUGS = {
    "states of the first token": ("(rows.ends - 1)", "(rows.starts)"),
    "the last token's own product dropped": ("+ torch.where(_like(is_empty, own), 0, own)", ""),
    "all of the last step is its own": ("sigmoid(tokens.trap[last]) * tokens.dt[last]", "tokens.dt[last]"),
    "initial angle without gradients": ("sums + first.unsqueeze(1)", "sums + first.detach().unsqueeze(1)"),
    "initial angle of packed rows without gradients": ("first.unsqueeze(-1)", "first.detach().unsqueeze(-1)"),
    "turns without gradients": ("row_sums=row_sums", "row_sums=None"),
    "turns summed over steps": ("size = torch.ones_like(", "size = 2 * torch.ones_like("),
    "initial state forgotten": ("else before.ssm_state", "else 0 * before.ssm_state"),
    "v of the token before forgotten": ("k_state, before.v_state)", "k_state, 0 * before.v_state)"),
    "empty rows keep what is not theirs": ("torch.where(_like(is_empty, old), old, new.to(old.dtype))", "new"),
    "tokens of no row read": ("torch.where(_like(rows.owned, tensor), tensor, 0)", "tensor"),
    "outputs of tokens in no row": ("torch.where(_like(rows.owned, y), y, 0)", "y"),
    "C's bias dropped": ("(call.C, call.C_bias)", "(call.C, None)"),
    "weights of gates and outputs swapped": ("call.mimo_z, call.mimo_o", "call.mimo_o, call.mimo_z"),
    "gate dropped": ("None if call.z is None else packed(call.z)", "None"),
    "last k not turned": ("found.k[last]", "tokens.k[last]"),
}
"""Planted in the composition."""


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba3_chunk_scan, "recorded_as", lambda function: function)  # the op keeps its own
    module = load(tmp_path / "mutant_mamba3.py", changed(inspect.getsource(training), BUGS[name]))
    monkeypatch.setattr(functional, "mamba3", module)
    for sample in ("base", "gate", "packed, empty rows", "MIMO", "MIMO, packed, outputs of the rank"):
        try:
            judge(call_named(sample))
        except AssertionError:
            return
    pytest.fail("no sample caught it")
