"""The gated delta rule on a stand-in for FlashInfer (see stand_in.py): what the adapters say to it, and refuse.

No kernel of the vendor's runs here.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import chunk_gated_delta_rule, gated_delta_rule_update, registry, use_backend
from mamba_ops.registry import Op
from mamba_ops.testing.judge import front_on
from tests.harness import judge
from tests.on_flashinfer import stand_in
from tests.on_flashinfer.calls import Calls, refused, sample_of, samples_of, shifted

NO_UPDATE = {
    "gates given": "computes the gates itself, from a, b, A_log and dt_bias, and g and beta are given",
    "not normalised, turned state": "computes the gates itself, from a, b, A_log and dt_bias, and g and beta are given",
    "null rows, write slots": (
        "runs padding rows in slot 0 where the state is bfloat16 or there are write slots, and null_slot is 7; "
        "keep slot 0 free and say null_slot=0"
    ),
    "packed, empty row": "takes out in q's bfloat16, and it is float32",
    "speculative": "takes no packed rows",
    "speculative, write slots": "does no speculative decoding",
    "stochastic rounding": "takes a float32 or bfloat16 state, and it is float16",
    **dict.fromkeys(
        (sample.name for sample in samples_of(gated_delta_rule_update) if "int16" in sample.name),
        "takes a float32 or bfloat16 state, and it is int16",
    ),
}


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [sample.name for sample in samples_of(gated_delta_rule_update)])
def test_the_delta_rules_update(calls: Calls, name: str, state_dtype: torch.dtype) -> None:
    changes: dict[str, Any] = {"null_slot": 0} if state_dtype == torch.bfloat16 and name not in NO_UPDATE else {}
    sample = sample_of(gated_delta_rule_update, name, state_dtype=state_dtype, **changes)
    says = NO_UPDATE.get(name)
    if "padded slots" in name and state_dtype == torch.bfloat16:
        says = "takes a state whose slots start at multiples of 32 bytes, and not all of them do"
    if says is not None:
        assert refused(gated_delta_rule_update, sample) == says
        assert calls == []
    else:
        judge(gated_delta_rule_update, sample, front_on(gated_delta_rule_update, "flashinfer"))
        assert len(calls) == 1


def with_scratch(*args: Any, **kwargs: Any) -> Tensor:
    """The op on the stand-in, with what it left in slot 0, which is scratch there, taken out again."""
    before = args[0][0].clone()
    with use_backend("flashinfer"):
        result = gated_delta_rule_update(*args, **kwargs)
    args[0][0] = before
    return result


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("write_slots", [None, (6, 0, -1), (6, 4, 7)])
def test_rows_that_are_nobody_run_in_slot_0(
    calls: Calls, state_dtype: torch.dtype, write_slots: tuple[int, ...] | None, length: int
) -> None:
    name = "base" if length == 1 else "a few tokens, padded slots, a zero q"
    tables = {
        "slots": torch.tensor([-1, 0, 3]),
        "write_slots": None if write_slots is None else torch.tensor(write_slots),
    }
    dense: dict[str, Any] = {"ssm_state": lambda s: s.contiguous(), "state_dtype": state_dtype, "null_slot": 0}
    sample = sample_of(gated_delta_rule_update, name, **dense, **tables)
    judge(gated_delta_rule_update, sample, with_scratch)


def test_a_float32_state_needs_no_spare_slot(calls: Calls) -> None:
    sample = sample_of(gated_delta_rule_update, "base", slots=torch.tensor([-1, 0, 3]), null_slot=3)
    judge(gated_delta_rule_update, sample, front_on(gated_delta_rule_update, "flashinfer"))


REFUSED_UPDATES: list[tuple[dict[str, Any], str]] = [
    ({"q": lambda q: q.half()}, "takes a bfloat16 q, and it is float16"),
    ({"k": lambda k: k.float()}, "takes k in q's bfloat16, and it is float32"),
    (
        {"v": lambda v: v.float(), "out": lambda _: torch.zeros(3, 4, 128).bfloat16()},
        "takes v in q's bfloat16, and it is float32",
    ),
    ({"a": lambda a: a.float()}, "takes a in q's bfloat16, and it is float32"),
    ({"b": lambda b: b.float()}, "takes b in q's bfloat16, and it is float32"),
    ({"ssm_state": lambda s: s.half()}, "takes a float32 or bfloat16 state, and it is float16"),
    ({"slots": None, "write_slots": torch.tensor([6, 4, 7])}, "takes write_slots together with slots"),
    (
        {"ssm_state": lambda s: s.bfloat16()},
        (
            "runs padding rows in slot 0 where the state is bfloat16 or there are write slots, and null_slot "
            "is -1; keep slot 0 free and say null_slot=0"
        ),
    ),
    (
        {"ssm_state": lambda s: s.mT.contiguous().mT},
        "takes a state whose slots are each dense, and its strides are (65536, 16384, 1, 128)",
    ),
    ({"ssm_state": shifted}, "takes a state whose slots start at multiples of 32 bytes, and not all of them do"),
    (
        {"out": lambda _: torch.zeros(3, 128, 4).bfloat16().mT},
        "takes an out that is contiguous and starts at a multiple of 32 bytes",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED_UPDATES)
def test_the_update_refuses_in_a_sentence(calls: Calls, changes: dict[str, Any], sentence: str) -> None:
    sample = sample_of(gated_delta_rule_update, "base", **changes)
    assert refused(gated_delta_rule_update, sample) == sentence
    assert calls == []


NO_CHUNKS = {"packed, empty rows": "takes out in q's bfloat16, and it is float32"}


@pytest.mark.parametrize("name", [sample.name for sample in samples_of(chunk_gated_delta_rule)])
def test_the_chunked_delta_rule(calls: Calls, name: str) -> None:
    sample = sample_of(chunk_gated_delta_rule, name)
    if name in NO_CHUNKS:
        assert refused(chunk_gated_delta_rule, sample) == NO_CHUNKS[name]
        out = torch.zeros(sample.kwargs["out"].shape, dtype=torch.bfloat16)
        sample = sample_of(chunk_gated_delta_rule, name, out=out)
    judge(chunk_gated_delta_rule, sample, front_on(chunk_gated_delta_rule, "flashinfer"))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"q": lambda q: q.float()}, "takes a bfloat16 q, and it is float32"),
        ({"scale": 0.0}, "takes a scale of 0 for none given"),
        (
            {"out": lambda _: torch.zeros(3, 75, 128, 4).bfloat16().mT},
            "takes an out that is contiguous and starts at a multiple of 16 bytes",
        ),
        (
            dict.fromkeys(("q", "k", "v", "g", "beta"), lambda t: t[:, :0]) | {"out": None},
            "takes at least one token, and there is none",
        ),
    ],
)
def test_the_chunked_delta_rule_refuses(calls: Calls, changes: dict[str, Any], sentence: str) -> None:
    assert refused(chunk_gated_delta_rule, sample_of(chunk_gated_delta_rule, "base", **changes)) == sentence
    assert calls == []


@pytest.mark.parametrize("op", [gated_delta_rule_update, chunk_gated_delta_rule], ids=lambda op: op.name)
def test_what_the_delta_rule_needs(
    op: Op[...], calls: Calls, capability: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = samples_of(op)[0]
    assert refused(op, op.make_samples("cpu", k_dim=64, v_dim=128)[0]) == "takes a k_dim of 128, and it is 64"
    assert refused(op, op.make_samples("cpu", k_dim=128, v_dim=64)[0]) == "takes a v_dim of 128, and it is 64"
    # Put back before the stand-in is taken away: else it would stay.
    with stand_in.installed(needed=()), monkeypatch.context() as patch:
        patch.delitem(sys.modules, "cutlass", raising=False)
        assert refused(op, sample) == (
            "needs nvidia-cutlass-dsl for the gated delta rule, which is not installed; "
            "pip install 'mamba-ops[flashinfer]'"
        )
    capability(8, 9)
    registry.dispatcher.dispatcher.changed()
    assert refused(op, sample) == "takes GPUs from compute capability 9.0 on, and this one has 8.9"
