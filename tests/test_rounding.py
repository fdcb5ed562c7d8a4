"""Stochastic rounding of a float16 state: bit for bit by its definition, unbiased, between neighbours alone."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import selective_state_update
from mamba_ops.ops._common import rounding
from mamba_ops.registry import Backend
from mamba_ops.testing.judge import Front, front_on
from tests.conftest import ACCELERATOR
from tests.harness import PARTIAL, backends_here
from tests.ops.common import rounding as oracle
from tests.ops.selective_state_update.planted_bugs import ROUNDING_BUGS

# NumPy, which Triton's interpreter computes with, warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in:RuntimeWarning")

DEVICE = ACCELERATOR or torch.device("cpu")
BACKENDS = [name for name in backends_here(selective_state_update, DEVICE) if name not in PARTIAL]
OURS = [name for name in BACKENDS if name != "flashinfer"]  # which has a stream of its own
SEED = 0x0123456789ABCDEF
HEADS, DSTATE = 2, 64

SMALL = 2.0**-24  # the least float16
SPECIAL = [0.0, 1.0, -1.5, 65504.0, -65504.0, SMALL, -5 * SMALL, 2.0**-14]  # floats16, to be left alone
BETWEEN = [1 + 2.0**-12, -3 - 2.0**-10, 0.1, -1e-3, 7.3 * SMALL, -0.4 * SMALL, 2.0**-14 - 2.0**-26, 6.1e-5, 1e-9, 1e-40]
LARGE = [65505.0, 65519.9, -65535.5, 65536.0, -1e30]
NOT_NUMBERS = [math.inf, -math.inf, math.nan]


def call(front: Front, values: Tensor, tokens: int = 1, dstate: int = DSTATE, **options: Any) -> Tensor:
    """Store numbers, to the bit: channel (h, p) of token t of every row has `values[t, h, p]` in all entries.

    An all but infinite decay drops what was there, and a token adds B x = x.
    """
    rows = options.pop("rows", 2)
    _, heads, dim = values.shape
    at = {"device": DEVICE, "dtype": torch.float32}
    state = torch.zeros(8, heads, dim, dstate, device=DEVICE, dtype=torch.float16)
    x = values.to(DEVICE).expand(rows, tokens, heads, dim).contiguous()
    ones = torch.ones(rows, tokens, 1, dstate, **at)
    inputs = [x, torch.ones(rows, tokens, heads, **at), ones, ones]
    x, dt, B, C = (t[:, 0] for t in inputs) if tokens == 1 else inputs
    A = torch.full((heads,), -1000.0, **at)
    options = {"rounding_seed": SEED} | options
    options |= {k: torch.tensor(v, device=DEVICE) for k, v in options.items() if k != "philox_rounds" and v is not None}
    front(state, x, dt, A, B, C, **options)
    return state.cpu()


def expected(
    values: Tensor, stores: dict[int, int], seed: int = SEED, rounds: int = 10, dstate: int = DSTATE
) -> Tensor:
    """The cache after a call: slot to the token whose state is there."""
    _, heads, dim = values.shape
    state = torch.zeros(8, heads, dim, dstate, dtype=torch.float16)
    for slot, token in stores.items():
        state[slot] = oracle.stored(values[token].unsqueeze(-1).expand(heads, dim, dstate), seed, slot, rounds)
    return state


def laid_out(numbers: list[float], tokens: int = 1) -> Tensor:
    """Numbers as (tokens, HEADS, 64): the sizes that all backends take."""
    return (
        torch.tensor(numbers)
        .repeat(-(-tokens * HEADS * 64 // len(numbers)))[: tokens * HEADS * 64]
        .view(tokens, HEADS, 64)
    )


FORMS: dict[str, tuple[dict[str, Any], dict[int, int], dict[str, int]]] = {
    "slots": ({"slots": [5, 2]}, {5: 0, 2: 0}, {}),
    "in order": ({}, {0: 0, 1: 0}, {}),
    "write slots, rounds": ({"slots": [5, 2], "write_slots": [7, -1], "philox_rounds": 7}, {7: 0}, {"rounds": 7}),
    "speculative": (
        {"tokens": 2, "slots": [[3, 4], [6, 0]], "num_accepted_tokens": [1, 2], "rounding_seed": [-3]},
        {3: 0, 4: 1, 6: 0, 0: 1},
        {"seed": -3},
    ),
    "two tokens": ({"tokens": 2, "slots": [3, 4]}, {3: 1, 4: 1}, {}),
}


def judge_bits(front: Front, form: str, dim: int = 64, dstate: int = DSTATE) -> None:
    """Raise AssertionError unless a call of this form stores what the definition says, to the bit."""
    options, stores, wanted = FORMS[form]
    tokens = options.get("tokens", 1)
    numbers = SPECIAL + BETWEEN + (LARGE + NOT_NUMBERS if tokens == 1 else [])
    values = laid_out(numbers, tokens)[..., :dim]
    got, right = call(front, values, dstate=dstate, **options), expected(values, stores, dstate=dstate, **wanted)
    torch.testing.assert_close(got, right, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit()[~got.isnan()], right.signbit()[~got.isnan()])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", OURS)
def test_bit_for_bit(backend: str, form: str) -> None:
    judge_bits(front_on(selective_state_update, backend), form, dim=24, dstate=16)


@pytest.mark.parametrize("dstate", [1, 2, 6, 17])
@pytest.mark.parametrize("backend", OURS)
def test_any_dstate(backend: str, dstate: int) -> None:
    judge_bits(front_on(selective_state_update, backend), "slots", dim=24, dstate=dstate)


@pytest.fixture
def planted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Name of a backend whose kernel is ours with one bug in it."""
    pytest.importorskip("triton", reason="the kernel that bugs are planted in is Triton's")
    from tests.test_mutants import triton_with

    kernel = triton_with(request.param, selective_state_update, tmp_path)
    backend = Backend("mutant", devices=[DEVICE.type])
    backend.implements(selective_state_update)(kernel)
    yield backend.name
    backend.remove()


@pytest.mark.parametrize("planted", [pytest.param(bug, id=name) for name, bug in ROUNDING_BUGS.items()], indirect=True)
def test_planted_bug_is_caught(planted: str) -> None:
    for form in FORMS:
        try:
            judge_bits(front_on(selective_state_update, planted), form, dim=24, dstate=16)
        except AssertionError:
            return
    pytest.fail("no form of call caught it")


@pytest.mark.parametrize("backend", BACKENDS)
def test_unbiased(backend: str) -> None:
    """The mean of 10^5 roundings is within 4 sigma of the number, and only its neighbours occur."""
    numbers = [1 + 0.3 * 2.0**-10, -3.14159, 1e-3, 60000.1, 0.9999, 7.77e-5]
    if backend != "flashinfer":  # which flushes what is subnormal
        numbers += [5.37 * SMALL, -0.02 * SMALL, 3e-5]
    for number in torch.tensor(numbers).tolist():
        values = torch.full((1, 13, 64), number)
        front = front_on(selective_state_update, backend)
        state = call(front, values, dstate=128, rows=1, slots=[6])[6].double()
        low, high = oracle.neighbours(number)
        up = state == high
        assert bool((up | (state == low)).all())
        part, n = (number - low) / (high - low), state.numel()
        assert n > 1e5
        assert abs(float(up.double().mean()) - part) < 4 * math.sqrt(part * (1 - part) / n), number


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float16_is_never_rounded(backend: str) -> None:
    numbers = [number for number in SPECIAL if backend != "flashinfer" or number == 0 or abs(number) >= 2.0**-14]
    values = laid_out(numbers)
    for slot in call(front_on(selective_state_update, backend), values)[:2]:
        assert torch.equal(slot, values[0, :, :, None].half().expand_as(slot))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_of_seed_slot_and_element(backend: str) -> None:
    front = front_on(selective_state_update, backend)
    values = laid_out([0.1])
    one, other = (call(front, values, slots=slots) for slots in ([3, 6], [6, 3]))
    assert torch.equal(one, other)
    assert not torch.equal(one[3], one[6])
    assert not torch.equal(one[3, 0], one[3, 1])
    assert torch.equal(one[3], call(front, values, slots=[3, -1])[3])
    for seed in (SEED + 1, SEED + 2**32):
        assert not torch.equal(one[3], call(front, values, slots=[3, 6], rounding_seed=seed)[3])
    ten, seven = (call(front, values, slots=[3, 6], philox_rounds=rounds) for rounds in (10, 7))
    assert torch.equal(one, ten)
    assert not torch.equal(one, seven)


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # known answers, from the authors' library
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator(key: tuple[int, int], counter: tuple[int, int, int, int], words: tuple[int, ...]) -> None:
    assert oracle.philox(key, counter) == words
    seed = key[0] | key[1] << 32
    seed -= 2**64 * (seed >= 2**63)
    a, b, c, _ = (torch.tensor([word]) for word in counter)
    ours = rounding.philox(torch.tensor([seed]), (a, b, c), 10)
    assert ours.tolist() == [list(oracle.philox(key, (*counter[:3], 0)))]


COMPILED = """
import json, sys
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from tests.compile_only import Driver
from mamba_ops import selective_state_update
from mamba_ops.ops._triton import states

capability = int(sys.argv[1])
Driver.get_current_target = lambda self: GPUTarget("cuda", capability, 32)
states._capability = lambda device: divmod(capability, 10)
used = []
def note(*, key, fn, **_):
    used.append("cvt.rs.f16x2.f32" in fn.jit_function.device_caches[0][0][key].asm["ptx"])
knobs.runtime.jit_post_compile_hook = note
table = torch.tensor([[3, 4], [6, 0]])
for form in (
    {},
    {"slots": table[:, 0], "write_slots": table[:, 1]},
    {"slots": table, "num_accepted_tokens": torch.tensor([1, 2])},
):
    state, x, B = torch.zeros(8, 2, 16, 16, dtype=torch.float16), torch.zeros(2, 2, 16), torch.zeros(2, 1, 16)
    seed = torch.tensor([1])
    selective_state_update(state, x, x[..., 0], x[0, :, 0], B, B, rounding_seed=seed, **form)
print(json.dumps(used))
"""


@pytest.mark.parametrize(("capability", "by_hardware"), [(90, False), pytest.param(100, True, marks=pytest.mark.slow)])
def test_it_compiles_for_gpus_with_and_without_the_instruction(capability: int, by_hardware: bool) -> None:
    """The interpreter takes what a compiler does not; so every way to store is compiled, for an H100 and for a B200."""
    pytest.importorskip("triton")
    from tests.test_specialization import compiled_for_a_gpu

    assert compiled_for_a_gpu(COMPILED, capability) == [by_hardware] * 3
