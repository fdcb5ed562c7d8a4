"""vLLM's functions over our ops: its arguments, and what they mean to decode and convolutions, against the oracles."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops.compat import vllm
from mamba_ops.registry import use_backend
from tests.ops.causal_conv1d import oracle as causal_conv1d
from tests.ops.causal_conv1d_update import oracle as causal_conv1d_update
from tests.ops.selective_state_update import oracle as selective_state_update
from tests.vllm_inputs import DEVICE, DIM, DSTATE, GROUPS, HEADS, close, ints, normal, on_pages

ORIGINALS = {  # the parameters of vLLM 0.33.0; a default follows its name
    "selective_state_update": "state x dt A B C D dt_bias z=None dt_softplus=False state_batch_indices=None "
    "dst_state_batch_indices=None null_block_id=0 out=None num_accepted_tokens=None cu_seqlens=None is_blackwell=False "
    "enable_stochastic_rounding=False cache_philox_rounds=0",
    "selective_scan_fn": "u ssm_states delta A B C D=None z=None delta_bias=None delta_softplus=False "
    "query_start_loc=None cache_indices=None has_initial_state=None null_block_id=0 block_size=1024 "
    "block_idx_first_scheduled_token=None block_idx_last_scheduled_token=None initial_state_idx=None "
    "cu_chunk_seqlen=None last_chunk_indices=None",
    "causal_conv1d_fn": "x weight bias conv_states query_start_loc cache_indices=None has_initial_state=None "
    "activation=silu pad_slot_id=-1 null_block_id=0 metadata=None validate_data=False",
    "causal_conv1d_update": "x conv_state weight bias=None activation=None conv_state_indices=None "
    "num_accepted_tokens=None query_start_loc=None max_query_len=-1 null_block_id=0 validate_data=False out=None",
    "mamba_chunk_scan_combined_varlen": "x dt A B C chunk_size cu_seqlens cu_chunk_seqlens last_chunk_indices seq_idx "
    "out D=None z=None dt_bias=None initial_states=None dt_softplus=False dt_limit=(0.0, inf) "
    "return_intermediate_states=False state_dtype=None final_states_out=None final_state_indices=None",
}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), use_backend("torch"):  # which alone takes float64
        yield


@pytest.mark.parametrize("name", ORIGINALS)
def test_every_parameter_has_its_name_place_and_default(name: str) -> None:
    parameters = inspect.signature(getattr(vllm, name)).parameters.values()
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    shown = [p.name + ("" if p.default is p.empty else f"={p.default}") for p in parameters]
    assert " ".join(shown) == ORIGINALS[name]


# ---- selective_state_update ------------------------------------------------------------------------------------------


def step_arguments(tokens: int, *, tied: bool) -> dict[str, Tensor]:
    per_head = {"dt": normal(tokens, HEADS), "A": -normal(HEADS).exp(), "D": normal(HEADS), "dt_bias": normal(HEADS)}
    shapes = {"dt": (tokens, HEADS, DIM), "A": (HEADS, DIM, DSTATE), "D": (HEADS, DIM), "dt_bias": (HEADS, DIM)}
    if tied:
        weights = {
            n: t.view(*t.shape, *[1] * (len(shapes[n]) - t.dim())).expand(shapes[n]) for n, t in per_head.items()
        }
    else:
        weights = {n: -normal(*shape).exp() if n == "A" else normal(*shape) for n, shape in shapes.items()}
    return {
        "x": normal(tokens, HEADS, DIM),
        "B": normal(tokens, GROUPS, DSTATE),
        "C": normal(tokens, GROUPS, DSTATE),
        "z": normal(tokens, HEADS, DIM),
        **weights,
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("tokens", "indices", "rows"),
    [
        (4, {"state_batch_indices": ints(3, 0, 5, -1)}, {"slots": ints(3, 0, 5, -1)}),
        (
            3,
            {"state_batch_indices": ints([3], [1], [5]), "dst_state_batch_indices": ints([2], [0], [5])},
            {"slots": ints([3], [1], [5]), "write_slots": ints([2], [0], [5])},
        ),
        (3, {"dst_state_batch_indices": ints(9, 9, 9)}, {}),
        (6, {"cu_seqlens": ints(0, 1, 1, 4), "state_batch_indices": ints(4, 5, 2)}, {"slots": ints(4, 5, 2)}),
        (
            5,
            {
                "cu_seqlens": ints(0, 3, 5),
                "num_accepted_tokens": ints(2, 1),
                "state_batch_indices": ints([1, 2, 3], [4, 5, 0]),
            },
            {"slots": ints([1, 2, 3], [4, 5, 0])},
        ),
    ],
    ids=["one token", "destinations", "no indices", "varlen", "speculative"],
)
def test_selective_state_update(tokens: int, indices: Any, rows: Any, tied: bool) -> None:
    arguments, state = step_arguments(tokens, tied=tied), on_pages(6, HEADS, DIM, DSTATE)
    out, before = normal(tokens, HEADS, DIM), state.clone()
    same = {n: t for n, t in indices.items() if n in ("cu_seqlens", "num_accepted_tokens")}
    null = {} if "state_batch_indices" not in indices else {"null_slot": 0}
    expected = selective_state_update.selective_state_update(
        before, **arguments, dt_softplus=True, out=out.clone(), **rows, **same, **null
    )
    assert vllm.selective_state_update(state, **arguments, dt_softplus=True, out=out, **indices) is None
    close((out, state), expected[:2])
    if "state_batch_indices" in indices:
        close(state[0], before[0])


def test_selective_state_update_without_heads_is_mamba_1() -> None:
    state, x, dt, z, out = on_pages(5, 12, 8), *(normal(3, 12) for _ in range(4))
    A, B, C, D, bias, slots = -normal(12, 8).exp(), normal(3, 8), normal(3, 8), normal(12), normal(12), ints(2, 4, 1)
    options: dict[str, Any] = {"z": z, "dt_softplus": True}
    expected = selective_state_update.selective_state_update(
        state, x, dt, A, B, C, D=D, dt_bias=bias, slots=slots, out=out, **options
    )
    vllm.selective_state_update(state, x, dt, A, B, C, D, bias, state_batch_indices=slots, out=out, **options)
    close((out, state), expected[:2])


def test_selective_state_update_refuses() -> None:
    arguments = (on_pages(6, HEADS, DIM, DSTATE),)
    with pytest.raises(ValueError, match="out: got None, expected a tensor like x"):
        vllm.selective_state_update(*arguments, **step_arguments(2, tied=True))
    options: dict[str, Any] = {"out": normal(2, HEADS, DIM), "enable_stochastic_rounding": True}
    with pytest.raises(
        ValueError, match="ssm_state: got float64, expected float16, int16 or float8_e4m3fn; rounding_seed"
    ):
        vllm.selective_state_update(*arguments, **step_arguments(2, tied=True), **options)


# ---- convolutions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_last", [True, False])
@pytest.mark.parametrize("activation", ["silu", "swish", True, None, False])
def test_causal_conv1d_fn(activation: Any, channel_last: bool) -> None:
    x = normal(11, 10).t() if channel_last else normal(10, 11)
    weight, bias, states = normal(10, 4), normal(10), on_pages(6, 5, 10).transpose(1, 2)
    starts, slots = ints(0, 2, 2, 7, 10), ints(3, 5, 0, 1)
    known = torch.tensor([True, False, True, False], device=DEVICE)
    rows: dict[str, Any] = {"cu_seqlens": starts, "slots": slots, "has_initial_state": known, "null_slot": 0}
    expected, new = causal_conv1d.causal_conv1d(x.t(), weight, bias, conv_state=states, silu=bool(activation), **rows)
    before = x.clone(), states.clone()
    out = vllm.causal_conv1d_fn(x, weight, bias, states, starts, slots, known, activation, metadata=object())
    close((out[:, :10], states), (expected.t()[:, :10], new))
    close((x, states[0]), (before[0], before[1][0]))
    assert not out[:, 2:7].any()
    assert out.stride() == (1, 10)  # channels lie together


def test_causal_conv1d_fn_computes_in_the_dtype_of_the_states() -> None:
    x, weight, states = normal(10, 6).bfloat16(), normal(10, 3), normal(3, 10, 2).float()
    out = vllm.causal_conv1d_fn(x, weight, None, states.clone(), ints(0, 6), ints(1))
    wide = vllm.causal_conv1d_fn(x.float(), weight, None, states.clone(), ints(0, 6), ints(1))
    assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    close(out, wide.bfloat16())


UPDATES = {
    "one token": ((4, 10), {"conv_state_indices": ints(3, 0, 5, 1)}),
    "a few tokens": ((4, 10, 3), {"conv_state_indices": ints([3, 9], [0, 9], [5, 9], [1, 9])}),
    "speculative": ((2, 10, 3), {"conv_state_indices": ints(3, 1), "num_accepted_tokens": ints(2, 1)}),
    "varlen": (
        (8, 10),
        {"conv_state_indices": ints(3, 0, 5), "query_start_loc": ints(0, 3, 5, 6, 6), "max_query_len": 3},
    ),
    "varlen, speculative": (
        (6, 10),
        {
            "conv_state_indices": ints(3, 5, 1),
            "query_start_loc": ints(0, 3, 3, 5),
            "num_accepted_tokens": ints(3, 1, 1),
            "max_query_len": 3,
        },
    ),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", UPDATES)
def test_causal_conv1d_update(name: str, given: bool) -> None:
    shape, options = UPDATES[name]
    x, weight, bias, state = normal(*shape), normal(10, 4), normal(10), on_pages(6, 5, 10).transpose(1, 2)
    rows = x.transpose(1, 2) if x.dim() == 3 else x
    starts, slots = options.get("query_start_loc"), options["conv_state_indices"]
    expected, new = causal_conv1d_update.causal_conv1d_update(
        rows,
        state,
        weight,
        bias,
        slots=slots,
        cu_seqlens=None if starts is None else starts[: len(slots) + 1],
        num_accepted_tokens=options.get("num_accepted_tokens"),
        null_slot=0,
        out=rows,
    )
    out, before = torch.zeros_like(x) if given else None, (x.clone(), state[0].clone())
    result = vllm.causal_conv1d_update(x, state, weight, bias, "silu", **options, out=out)
    assert result is (out if given else x)
    close((result.transpose(1, 2) if x.dim() == 3 else result, state), (expected, new))
    close((x if given else before[0], state[0]), before)


def test_causal_conv1d_update_refuses_another_output() -> None:
    with pytest.raises(ValueError, match=r"out: got \(2, 9\) of torch.float64 on .*, expected \(2, 10\)"):
        vllm.causal_conv1d_update(normal(2, 10), normal(2, 10, 3), normal(10, 4), out=normal(2, 9))
