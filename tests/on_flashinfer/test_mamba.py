"""Decode for Mamba-2 on a stand-in for FlashInfer (see stand_in.py): what the adapter says to it, and refuses.

No kernel of the vendor's runs here. On a GPU with FlashInfer installed the tests of all ops run them: op x backend x
sample.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import selective_state_update, use_backend
from mamba_ops.backends import flashinfer
from mamba_ops.functional import narrow_states
from mamba_ops.registry import Sample
from mamba_ops.testing.judge import front_on, refusal
from tests.harness import judge
from tests.on_flashinfer.calls import Calls, refused, sample_of, samples_of, shifted

WHOLE_HEAD = "takes one {0} for a whole head, and {0} has one for every channel"
NOT_TAKEN = {
    "per-channel dt": WHOLE_HEAD.format("dt"),
    "per-channel D and bias": WHOLE_HEAD.format("D"),
    **dict.fromkeys(
        (
            "full A",
            "nothing tied",
            "mamba1",
            "mamba1 gate",
            "packed mamba1",
            "everything",
            "int16 state, packed mamba1",
        ),
        "takes one A for a whole head, as Mamba-2 has it, and A has one for every channel and entry of the state",
    ),
    "float32 output": "takes out in x's bfloat16, and it is float32",
    "transposed state": "takes a state whose slots are each dense, and its strides are (16384, 4096, 1, 64)",
    "int16 state, padded scales, null destinations": (
        "takes a state whose slots are each dense, and its strides are (16384, 4096, 1, 64)"
    ),
    "int16 state, stochastic rounding, speculative rows": (
        "rounds an int16 state to the nearest, and a rounding_seed is given"
    ),
    "transposed x": "takes an out that is contiguous, and its strides are (1, 3, 12)",
    "rows of two tokens, by token": "takes an out that is contiguous, and its strides are (256, 768, 64, 1)",
    **dict.fromkeys(
        ("packed", "packed, empty and null rows", "packed, tokens past the end"),
        "takes packed rows in speculative decoding alone, where a table's columns limit a row's length",
    ),
}


@pytest.mark.parametrize("name", [sample.name for sample in samples_of(selective_state_update)])
def test_each_sample_is_right_by_the_oracle_or_refused(calls: Calls, name: str) -> None:
    sample = sample_of(selective_state_update, name)
    if name in NOT_TAKEN:
        assert refused(selective_state_update, sample) == NOT_TAKEN[name]
        assert calls == []
    elif name == "speculative, more tokens than columns":
        with use_backend("flashinfer"), pytest.raises(RuntimeError, match="a row has more tokens than its write slots"):
            selective_state_update(*sample.clone().args, **sample.clone().kwargs)
        assert calls == []
    else:
        judge(selective_state_update, sample, front_on(selective_state_update, "flashinfer"))
        assert len(calls) == (name != "no rows")


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["gate", "speculative rows"])
def test_dtypes(calls: Calls, name: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    sample = sample_of(selective_state_update, name, dtype=dtype, state_dtype=state_dtype)
    judge(selective_state_update, sample, front_on(selective_state_update, "flashinfer"))
    assert calls[0]["dt"].dtype == calls[0]["D"].dtype == torch.float32  # D is, so all three are


def test_what_the_vendor_is_told(calls: Calls) -> None:
    with use_backend("flashinfer"):
        selective_state_update(*(base := sample_of(selective_state_update, "base")).args, **base.kwargs)
        sample = sample_of(selective_state_update, "int64 slots, more than rows", null_slot=0)
        selective_state_update(*sample.args, **sample.kwargs)
    first, second = calls
    assert first["state_batch_indices"].dtype == second["state_batch_indices"].dtype == torch.int32
    assert [call["pad_slot_id"] for call in calls] == [-1, -1]
    assert second["state_batch_indices"].tolist() == [6, 3, -1]
    assert first["x"].data_ptr() == base.args[1].data_ptr()
    assert first["dst_state_batch_indices"] is first["cu_seqlens"] is first["rand_seed"] is None
    assert (first["cache_steps"], first["algorithm"]) == (0, "auto")


def test_weights_of_one_dtype_go_as_they_are(calls: Calls) -> None:
    sample = sample_of(selective_state_update, "base", D=lambda D: D.bfloat16(), dt_bias=None)
    judge(selective_state_update, sample, front_on(selective_state_update, "flashinfer"))
    assert calls[0]["D"].dtype == calls[0]["dt"].dtype == torch.bfloat16
    assert calls[0]["D"].data_ptr() != 0


def test_weights_that_lie_apart_or_are_float64(calls: Calls) -> None:
    apart = {
        "D": lambda D: D.repeat_interleave(2)[::2],
        "dt_bias": lambda b: b.double(),
        "A": lambda A: torch.stack([A, A], 1)[:, 0].double(),
        "dt": lambda dt: dt.t().contiguous().t(),
    }
    sample = sample_of(selective_state_update, "base", **apart)
    names = ("state", "x", "dt", "A", "B", "C")
    args = list(sample.args)
    for key in ("A", "dt"):
        args[names.index(key)] = apart[key](args[names.index(key)])
    kwargs = {key: value for key, value in sample.kwargs.items() if key not in ("A", "dt")}
    judge(selective_state_update, Sample("apart", tuple(args), kwargs), front_on(selective_state_update, "flashinfer"))


@pytest.mark.parametrize("null_slot", [-1, -5, 0, 3])
@pytest.mark.parametrize(("slots", "write_slots"), [((0, -1, 3), None), ((4, 6, 3), (0, 1, -2)), (None, (0, -7, 3))])
def test_whatever_means_nobody(
    calls: Calls, null_slot: int, slots: tuple[int, ...] | None, write_slots: tuple[int, ...] | None
) -> None:
    tables = {
        name: None if t is None else torch.tensor(t) for name, t in (("slots", slots), ("write_slots", write_slots))
    }
    sample = sample_of(selective_state_update, "gate", null_slot=null_slot, **tables)
    judge(selective_state_update, sample, front_on(selective_state_update, "flashinfer"))


def test_more_tokens_than_the_slots_have_columns(calls: Calls) -> None:
    """The vendor asks for as many columns where a row starts as it has tokens; we do not."""
    tables = {"slots": torch.tensor([[5], [1], [2]]), "write_slots": torch.tensor([[3, 4, 0], [6, 7, -1], [-1, 2, 5]])}
    accepted = torch.ones(3, dtype=torch.int32)  # one column holds one token's state
    sample = sample_of(selective_state_update, "speculative rows", num_accepted_tokens=accepted, **tables)
    judge(selective_state_update, sample, front_on(selective_state_update, "flashinfer"))


def test_a_projections_views(calls: Calls) -> None:
    sample = sample_of(selective_state_update, "views of a projection")
    judge(selective_state_update, sample, front_on(selective_state_update, "flashinfer"))
    assert calls[0]["B"].stride() == (512, 64, 1)


def apart(tensor: Tensor) -> Tensor:
    """The same numbers, with two more bytes or so from one token to the next."""
    padded = torch.nn.functional.pad(tensor.flatten(1), (0, 1))
    return padded[:, :-1].unflatten(1, tensor.shape[1:])


def double(tensor: Tensor) -> Tensor:
    return tensor.double()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "int16 state",
        {"ssm_state": lambda state: torch.zeros_like(state, dtype=torch.float8_e4m3fn)},
        "takes no float8_e4m3fn state, but one of int16",
    ),
    (
        "int16 state",
        {"state_scale": lambda scale: torch.cat([scale, scale], -1)[..., : scale.shape[-1]]},
        "takes a state_scale that is contiguous, and its strides are (512, 128, 1)",
    ),
    ("base", {"x": double}, "computes in float32, and x is float64"),
    ("base", {"ssm_state": double}, "computes in float32, and ssm_state is float64"),
    ("base", {"B": lambda B: B.float()}, "takes B in x's bfloat16, and it is float32"),
    ("base", {"C": lambda C: C.half()}, "takes C in x's bfloat16, and it is float16"),
    ("gate", {"z": lambda z: z.float()}, "takes z in x's bfloat16, and it is float32"),
    (
        "base",
        {"dt_bias": lambda b: b[:, None].expand(-1, 64)},
        "takes one dt_bias for a whole head, and dt_bias has one for every channel",
    ),
    (
        "base",
        {"ssm_state": lambda s: s[:2], "slots": [0, -1, 1]},
        "takes no more rows than state has slots, and there are 3 rows and 2 slots",
    ),
    (
        "speculative rows",
        {"groups": 1, "heads": 3},
        "takes 1, 2, 4, 8, 16, 32 or 64 heads a group for this call, and there are 3",
    ),
    (
        "base",
        {"ssm_state": shifted},
        "takes a state whose slots start at multiples of 16 bytes, and not all of them do",
    ),
    ("base", {"ssm_state": apart}, "takes a state whose slots start at multiples of 16 bytes, and not all of them do"),
    *(
        (name, {key: change}, f"takes tokens of {key} that start at multiples of 16 bytes, and not all of them do")
        for name, key in (("base", "x"), ("base", "B"), ("base", "C"), ("gate", "z"))
        for change in (shifted, apart)
    ),
    (
        "float16 state",
        {"out": lambda _: shifted(torch.zeros(3, 4, 64).bfloat16())},
        "takes tokens of out that start at multiples of 16 bytes, and not all of them do",
    ),
    (
        "base",
        {"x": lambda x: x.mT.contiguous().mT},
        "takes tokens of x that are each dense, and its strides are (256, 1, 4)",
    ),
    (
        "base",
        {"B": lambda B: B.repeat(1, 2, 1)[:, ::2]},
        "takes tokens of B that are each dense, and its strides are (256, 128, 1)",
    ),
]


@pytest.mark.parametrize(("name", "changes", "sentence"), REFUSED)
def test_it_refuses_in_a_sentence(calls: Calls, name: str, changes: dict[str, Any], sentence: str) -> None:
    changes = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in changes.items()}
    assert refused(selective_state_update, sample_of(selective_state_update, name, **changes)) == sentence
    assert calls == []


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"dim": 32}, "takes a dim of 64 or 128, and it is 32"),
        ({"dstate": 16}, "takes a dstate of 64, 96, 128 or 256, and it is 16"),
    ],
)
def test_it_refuses_sizes(calls: Calls, sizes: dict[str, int], sentence: str) -> None:
    assert refused(selective_state_update, samples_of(selective_state_update, **sizes)[0]) == sentence


def test_it_refuses_more_slots_than_it_tells_apart(calls: Calls) -> None:
    sample = sample_of(selective_state_update, "base", ssm_state=lambda state: state[:1].expand(2**24, -1, -1, -1))
    says = "takes a state of fewer than 16777216 slots, and it has 16777216"
    assert refusal(selective_state_update, "flashinfer", sample) == says


def test_it_refuses_rows_of_many_tokens(calls: Calls) -> None:
    sample = sample_of(
        selective_state_update, "rows of two tokens", **dict.fromkeys("xzBC", lambda t: t.repeat(1, 10, 1, 1))
    )
    long = Sample("long", (*sample.args[:2], sample.args[2].repeat(1, 10, 1), *sample.args[3:]), sample.kwargs)
    assert refused(selective_state_update, long) == "takes at most 16 tokens a row, and there may be 20"


@pytest.mark.parametrize(
    ("numbers", "algorithm", "name", "sentence"),
    [
        ((7, 5), "auto", "base", "takes GPUs from compute capability 8.0 on, and this one has 7.5"),
        ((8, 6), "auto", "base", None),
        (
            (8, 6),
            "vertical",
            "base",
            "takes the algorithm vertical on GPUs from compute capability 9.0 on, and this one has 8.6",
        ),
        ((8, 6), "simple", "speculative rows", None),
        ((9, 0), "vertical", "base", None),
        ((9, 0), "horizontal", "base", None),
        (
            (9, 0),
            "vertical",
            "write slots",
            (
                "takes the algorithm vertical for several tokens a row, or write slots, on GPUs from compute "
                "capability 10.0 on, and this one has 9.0"
            ),
        ),
        ((10, 0), "vertical", "speculative rows", None),
        (
            (10, 0),
            "horizontal",
            "int16 state, two tokens",
            "takes no int16 state with the algorithm horizontal for several tokens a row, or write slots",
        ),
        ((10, 0), "horizontal", "speculative packed", "takes no packed rows with the algorithm horizontal"),
    ],
)
def test_algorithms(
    calls: Calls,
    capability: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    numbers: tuple[int, int],
    algorithm: str,
    name: str,
    sentence: str | None,
) -> None:
    capability(*numbers)
    # a configuration would refuse some
    monkeypatch.setattr(type(flashinfer), "settings", property(lambda _: {"algorithm": algorithm}))
    narrow = name == "int16 state, two tokens"
    sample = sample_of(selective_state_update, "rows of two tokens" if narrow else name)
    if narrow:
        state, scale = narrow_states(sample.args[0])
        sample = Sample(name, (state, *sample.args[1:]), {**sample.kwargs, "state_scale": scale})
    if sentence is None:
        judge(selective_state_update, sample, front_on(selective_state_update, "flashinfer"))
        assert calls[0]["algorithm"] == algorithm
    else:
        assert refused(selective_state_update, sample) == sentence


def test_settings_of_a_device(capability: Callable[[int, int], None]) -> None:
    assert flashinfer.choices == {"algorithm": ("auto", "simple", "vertical", "horizontal")}
    assert flashinfer.settings == {"algorithm": "auto"}
    assert flashinfer.why_not_setting is not None
    capability(8, 0)
    says = "takes the algorithm horizontal on GPUs from compute capability 9.0 on, and this one has 8.0"
    assert flashinfer.why_not_setting("algorithm", "horizontal", torch.device("cpu")) == says
    assert flashinfer.why_not_setting("algorithm", "simple", torch.device("cpu")) is None
