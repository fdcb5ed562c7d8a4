"""States in int16 and float8_e4m3fn: bit for bit by their definition, with a scale for each row."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import gated_delta_rule_update, kda_update, selective_state_update
from mamba_ops.ops._common.narrow import MOST, as_bytes, narrow, widen
from mamba_ops.registry import Backend, Op
from mamba_ops.testing.judge import Front, front_on
from tests.conftest import ACCELERATOR
from tests.harness import PARTIAL, backends_here, expected, judge
from tests.ops.common import narrow as oracle
from tests.ops.selective_state_update.planted_bugs import NARROW_BUGS

# NumPy, which Triton's interpreter computes with, warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in:RuntimeWarning")

DEVICE = ACCELERATOR or torch.device("cpu")
OPS: list[Op[...]] = [selective_state_update, gated_delta_rule_update, kda_update]
OURS = [name for name in backends_here(selective_state_update, DEVICE) if name not in (*PARTIAL, "flashinfer")]
SEED = 0x0123456789ABCDEF
HEADS, DIM, DSTATE = 2, 6, 20
ROWS = {
    "numbers": torch.linspace(-3, 5, DSTATE),
    "small beside large": torch.tensor([1.0, -0.5, *(2.0**-k * 1.37 for k in range(1, DSTATE - 1))]),
    "in the middle": torch.tensor([32767.0, *(k + 0.5 for k in range(-9, DSTATE - 10))]),
    "in the middle of 8 bits": torch.tensor([448.0, *(2.0**k * (1 + 2.0**-4) for k in range(-9, DSTATE - 10))]),
    "zeros": torch.zeros(DSTATE),
    "tiny": torch.full((DSTATE,), 1e-40),
    "small": torch.linspace(-1, 1, DSTATE) * 1e-36,
    "huge": torch.linspace(-1, 1, DSTATE) * 3e38,
    "an infinity": torch.tensor([1.0] * (DSTATE - 1) + [-math.inf]),
    "a NaN": torch.tensor([math.nan] + [1.0] * (DSTATE - 1)),
    "negative zeros": -torch.zeros(DSTATE),
    "one number": torch.tensor([0.0] * (DSTATE - 1) + [-7.3]),
}


def rows(tokens: int) -> Tensor:
    """The rows above as states of some tokens, (tokens, HEADS, DIM, DSTATE); those of later ones are turned."""
    state = torch.stack([*ROWS.values()]).view(HEADS, DIM, DSTATE)
    return torch.stack([state.roll(t, dims=1) for t in range(tokens)])


def call(front: Front, states: Tensor, dtype: torch.dtype, seed: int | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Store states, to the bit, by calls of one channel each: B is the row, and an all but infinite decay drops what
    was there. All rows of the batch get the same.
    """
    tokens, heads, dim, dstate = states.shape
    cache = as_bytes(torch.zeros(8, heads, dim, dstate).to(dtype)).to(DEVICE).view(dtype)
    scale = torch.zeros(8, heads, dim, device=DEVICE)
    options = {name: torch.tensor(value, device=DEVICE) for name, value in options.items()}
    n = 2
    A = torch.full((heads, dim, dstate), -1000.0, device=DEVICE)
    one = torch.ones(n, tokens, heads, dim, device=DEVICE)
    # a head for each row: B has a group for each
    B = states.to(DEVICE).flatten(1, 2).expand(n, tokens, heads * dim, dstate).contiguous()
    one, A = one.flatten(2).unsqueeze(-1), A.flatten(0, 1).unsqueeze(1)
    cache, scale = cache.view(8, heads * dim, 1, dstate), scale.view(8, heads * dim, 1)
    inputs = [one, one[..., 0], B, B]
    x, dt, B, C = (t[:, 0] for t in inputs) if tokens == 1 else inputs
    if seed is not None:
        options["rounding_seed"] = torch.tensor(seed, device=DEVICE)
    front(cache, x, dt, A, B, C, state_scale=scale, **options)
    return cache.view(8, heads, dim, dstate).cpu(), scale.view(8, heads, dim).cpu()


FORMS: dict[str, tuple[int, dict[str, Any], dict[int, int]]] = {
    "slots": (1, {"slots": [5, 2]}, {5: 0, 2: 0}),
    "in order": (1, {}, {0: 0, 1: 0}),
    "write slots": (1, {"slots": [5, 2], "write_slots": [7, -1]}, {7: 0}),
    "speculative": (2, {"slots": [[3, 4], [6, 0]], "num_accepted_tokens": [1, 2]}, {3: 0, 4: 1, 6: 0, 0: 1}),
}


def judge_bits(front: Front, form: str, dtype: torch.dtype, seed: int | None) -> None:
    """Raise AssertionError unless a call of this form stores what the definition says, to the bit."""
    tokens, options, stores = FORMS[form]
    states = rows(tokens)
    if tokens > 1:  # what is no number stays in a state
        states = states.nan_to_num(1.0, 2.0, -2.0).clamp(-1e30, 1e30)
    got, scale = call(front, states, dtype, seed, **options)
    right, right_scale = torch.zeros(got.shape).to(dtype), torch.zeros(scale.shape)
    for slot, token in stores.items():
        state, numbers = oracle.stored(states[token], dtype, seed, slot)
        as_bytes(right)[slot], right_scale[slot] = as_bytes(state), numbers
    torch.testing.assert_close(scale, right_scale, rtol=0, atol=0, equal_nan=True)
    got, right = got.float(), right.float()  # zeros have no sign to speak of
    torch.testing.assert_close(got, right, rtol=0, atol=0)


def judge_scales(front: Front, dtype: torch.dtype) -> None:
    """Raise AssertionError unless the rows of a head have scales of their own: here they are multiples of one row."""
    sizes = 2.0 ** torch.arange(-9.0, 9.0, 3.0, device=DEVICE)
    cache = as_bytes(torch.zeros(1, 1, DIM, DSTATE).to(dtype)).to(DEVICE).view(dtype)
    scale, B = torch.zeros(1, 1, DIM, device=DEVICE), ROWS["numbers"].view(1, 1, DSTATE).to(DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    front(cache, sizes.view(1, 1, DIM), one, -1000 * one[0], B, B, state_scale=scale)
    state, numbers = oracle.stored(ROWS["numbers"].expand(1, DSTATE), dtype, None, 0)
    assert torch.equal(cache[0, 0].cpu().float(), state.float().expand(DIM, -1))
    assert torch.equal(scale[0, 0].cpu(), numbers * sizes.cpu())


def judge_reads(front: Front) -> None:
    """Raise AssertionError unless each number of 8 bits is read as it is: a row with the largest of them stays."""
    sizes = torch.arange(0x7F, dtype=torch.uint8, device=DEVICE)
    cache = torch.stack([sizes, sizes | 0x80]).view(torch.float8_e4m3fn).view(1, 1, 2, 127)
    before, scale = cache.clone(), torch.full((1, 1, 2), 0.25, device=DEVICE)
    zero, row = torch.zeros(1, 1, device=DEVICE), torch.zeros(1, 1, 127, device=DEVICE)
    front(cache, zero.expand(1, 2).unsqueeze(1), zero, -1 - zero[0], row, row, state_scale=scale)
    assert torch.equal(cache.float(), before.float())
    assert bool((scale == 0.25).all())


@pytest.mark.parametrize("backend", OURS)
def test_all_numbers_of_8_bits_are_read(backend: str) -> None:
    judge_reads(front_on(selective_state_update, backend))


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("backend", OURS)
def test_rows_have_scales_of_their_own(backend: str, dtype: torch.dtype) -> None:
    judge_scales(front_on(selective_state_update, backend), dtype)


@pytest.mark.parametrize("seed", [None, SEED], ids=["nearest", "seed"])
@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", OURS)
def test_bit_for_bit(backend: str, form: str, dtype: torch.dtype, seed: int | None) -> None:
    seed = -3 if seed and form == "write slots" else seed
    judge_bits(front_on(selective_state_update, backend), form, dtype, seed)


@pytest.fixture
def planted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Name of a backend whose kernel is ours with one bug in it."""
    pytest.importorskip("triton", reason="the kernel that bugs are planted in is Triton's")
    from tests.test_mutants import triton_with

    kernel = triton_with(request.param, selective_state_update, tmp_path)
    # What takes the place of instructions for 8-bit floats has bugs, too: no GPU here has these instructions.
    kernel.__globals__["_capability"] = lambda device: (0, 0)
    backend = Backend("mutant", devices=[DEVICE.type])
    backend.implements(selective_state_update)(kernel)
    yield backend.name
    backend.remove()


@pytest.mark.parametrize(
    "planted",
    [
        pytest.param(bug, id=name, marks=pytest.mark.slow if number >= 3 and ACCELERATOR is None else ())
        for number, (name, bug) in enumerate(NARROW_BUGS.items())
    ],
    indirect=True,
)
def test_planted_bug_is_caught(planted: str) -> None:
    front = front_on(selective_state_update, planted)
    with pytest.raises(AssertionError):
        judge_all(front)


def judge_all(front: Front) -> None:
    """Raise AssertionError unless states are read and stored as the definition says."""
    judge_reads(front)
    for dtype in MOST:
        judge_scales(front, dtype)
        for seed in (None, SEED):
            judge_bits(front, "slots", dtype, seed)


def narrowed(op: Op[...], dtype: torch.dtype, name: str = "base", **more: Any) -> Any:
    """An op's sample with a narrow state."""
    sample = next(s for s in op.make_samples(DEVICE) if s.name == name)
    state, scale = narrow(sample.args[0], dtype)
    return type(sample)(f"{name}, {dtype}", (state, *sample.args[1:]), {**sample.kwargs, "state_scale": scale, **more})


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_call_that_is_in_float32(op: Op[...], backend: str, dtype: torch.dtype) -> None:
    """Samples with another state stand for the same numbers, but for what is rounded away."""
    for sample in op.make_samples(DEVICE)[:: 1 if backend == "torch" else 5]:
        if sample.args[0].dtype == torch.float32 and "state_scale" not in sample.kwargs:
            judge(op, narrowed(op, dtype, sample.name), front_on(op, backend))


@pytest.mark.parametrize("dtype", MOST)
def test_widening_gives_what_was_narrowed(dtype: torch.dtype) -> None:
    states = torch.randn(3, 4, 5, 64) * torch.logspace(-20, 20, 5).view(5, 1)
    state, scale = narrow(states, dtype)
    wide = widen(state, scale, torch.float32)
    step = states.abs().amax(-1, keepdim=True) * (2**-16 if dtype == torch.int16 else 2**-4)
    assert bool(((wide - states).abs() <= 1.001 * step).all())
    again, same = narrow(wide, dtype)
    assert torch.equal(again.float(), state.float())
    torch.testing.assert_close(same, scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", MOST)
def test_states_of_16_bits_are_narrowed_in_float32(dtype: torch.dtype) -> None:
    for given in (torch.float16, torch.bfloat16):
        states = torch.randn(3, 5, 64).to(given)
        got, right = narrow(states, dtype), narrow(states.float(), dtype)
        assert all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("backend", OURS)
def test_unbiased(backend: str, dtype: torch.dtype) -> None:
    """The mean of many roundings is within 4 sigma of the number, and only its neighbours occur."""
    row = torch.full((1, 1, 512), 0.7 + 1e-5)
    row[..., 0] = MOST[dtype] * (2.0**-14 if dtype == torch.int16 else 2.0**-8)
    states = row.expand(1, 1, 64, 512) if backend == "torch" else row.expand(1, 1, 16, 512)
    front = front_on(selective_state_update, backend)
    state, scale = call(front, states, dtype, SEED, slots=[6, 3])
    numbers = widen(state, scale, torch.float64)[6][..., 1:]
    found = numbers.unique()
    assert len(found) == 2
    low, high = found.tolist()
    part, n = (float(row[0, 0, 1]) - low) / (high - low), numbers.numel()
    assert 0.01 < part < 0.99
    assert abs(float((numbers == high).double().mean()) - part) < 4 * math.sqrt(part * (1 - part) / n)


def test_expected_is_not_rounded() -> None:
    """The truth that narrow states are judged by is that of the numbers that they stand for."""
    sample = narrowed(selective_state_update, torch.float8_e4m3fn)
    assert expected(selective_state_update, sample, torch.float64)["ssm_state"].dtype == torch.float64


COMPILED = """
import json, sys
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from tests.compile_only import Driver
from mamba_ops import gated_delta_rule_update, kda_update, selective_state_update
from mamba_ops.functional import narrow_states
from mamba_ops.ops._triton import states

capability = int(sys.argv[1])
Driver.get_current_target = lambda self: GPUTarget("cuda", capability, 32)
states._capability = lambda device: divmod(capability, 10)
used = []
def note(*, key, fn, **_):
    used.append("e4m3x2" in fn.jit_function.device_caches[0][0][key].asm["ptx"])
knobs.runtime.jit_post_compile_hook = note
table, seed = torch.tensor([[3, 4], [6, 0]]), torch.tensor([1])
for dtype in (torch.int16, torch.float8_e4m3fn):
    for form in ({"rounding_seed": seed}, {"slots": table, "num_accepted_tokens": torch.tensor([1, 2])}):
        state, scale = narrow_states(torch.zeros(8, 2, 16, 16), dtype)
        x, B = torch.zeros(2, 2, 16), torch.zeros(2, 1, 16)
        selective_state_update(state, x, x[..., 0], x[0, :, 0], B, B, state_scale=scale, **form)
        gates = {"g": x[..., 0], "beta": x[..., 0]}
        gated_delta_rule_update(state, x, x, x, state_scale=scale, **gates, **form)
        gates["g"] = x
        kda_update(state, x, x, x, state_scale=scale, **gates, **form)
print(json.dumps(used))
"""


@pytest.mark.parametrize(
    ("capability", "by_hardware"),
    [(90, True), pytest.param(80, False, marks=pytest.mark.slow), pytest.param(100, True, marks=pytest.mark.slow)],
)
def test_it_compiles_for_gpus_with_and_without_8_bit_floats(capability: int, by_hardware: bool) -> None:
    """The interpreter takes what a compiler does not; so every kernel is compiled, for each format."""
    pytest.importorskip("triton")
    from tests.test_specialization import compiled_for_a_gpu

    assert compiled_for_a_gpu(COMPILED, capability) == [False] * 6 + [by_hardware] * 6
