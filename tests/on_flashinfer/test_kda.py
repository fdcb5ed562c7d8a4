"""Kimi Delta Attention on a stand-in for FlashInfer (see stand_in.py): what the adapters say to it, and refuse.

No kernel of the vendor's runs here.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import chunk_kda, kda_update, registry, use_backend
from mamba_ops.commands.bench import peers, run
from mamba_ops.ops._common.bench import LARGE, SMALL, Case, NotTaken
from mamba_ops.ops.chunk_kda.bench import case as prefill_case
from mamba_ops.ops.kda_update.bench import case as update_case
from mamba_ops.registry import Op
from mamba_ops.testing.judge import front_on
from tests.harness import judge
from tests.on_flashinfer import stand_in
from tests.on_flashinfer.calls import Calls, refused, sample_of, samples_of, shifted


@pytest.fixture(autouse=True)
def _blackwell(capability: Callable[[int, int], None]) -> None:
    capability(10, 0)


SPARE = (
    "leaves out a token whose state has no place, so that such states go to slot 0 where there are write slots or "
    "num_accepted_tokens, and null_slot is {}; keep slot 0 free and say null_slot=0"
)
NO_UPDATE = {
    "gates given": "takes g in q's bfloat16, and it is float32",
    "not normalised, turned state": "takes g in q's bfloat16, and it is float32",
    "a few tokens, padded slots, a zero q": (
        "keeps the state after every token, and so takes a few tokens a row with num_accepted_tokens alone; there are 2"
    ),
    "null rows, write slots": SPARE.format(7),
    "packed, empty row": "takes out in q's bfloat16, and it is float32",
    "speculative": "takes no packed rows",
    "speculative, write slots": SPARE.format(-1),
    "stochastic rounding": "takes a bfloat16 state, and it is float16",
    **dict.fromkeys(
        (sample.name for sample in samples_of(kda_update) if "int16" in sample.name),
        "takes a bfloat16 state, and it is int16",
    ),
}
NO_UPDATE["a few tokens, padded slots, a zero q, lower bound"] = NO_UPDATE["a few tokens, padded slots, a zero q"]


@pytest.mark.parametrize("name", [sample.name for sample in samples_of(kda_update)])
def test_the_update(calls: Calls, name: str) -> None:
    sample = sample_of(kda_update, name)
    if name in NO_UPDATE:
        assert refused(kda_update, sample) == NO_UPDATE[name]
        assert calls == []
    else:
        judge(kda_update, sample, front_on(kda_update, "flashinfer"))
        assert len(calls) == 1


def test_given_gates(calls: Calls) -> None:
    """Heads of v that share one of k, a state of padded slots, and no slot table."""
    gates: dict[str, Any] = {"g": lambda g: g.bfloat16(), "beta": lambda beta: beta.bfloat16()}
    for dim in (64, 128):
        [sample] = [
            s
            for s in kda_update.make_samples("cpu", k_heads=2, k_dim=dim, v_dim=dim, state_dtype=torch.bfloat16)
            if s.name == "gates given"
        ]
        arguments = {**sample.kwargs, **{name: change(sample.kwargs[name]) for name, change in gates.items()}}
        sample = type(sample)(sample.name, sample.args, arguments)
        judge(kda_update, sample, front_on(kda_update, "flashinfer"))
    assert len(calls) == 2


def with_scratch(*args: Any, **kwargs: Any) -> Tensor:
    """The op on the stand-in, with what it left in slot 0, which is scratch there, taken out again."""
    before = args[0][0].clone()
    with use_backend("flashinfer"):
        result = kda_update(*args, **kwargs)
    args[0][0] = before
    return result


@pytest.mark.parametrize("write_slots", [(6, 0, -1), (6, 4, 7)])
def test_states_that_have_no_place_go_to_slot_0(calls: Calls, write_slots: tuple[int, ...]) -> None:
    tables = {"slots": torch.tensor([-1, 2, 3]), "write_slots": torch.tensor(write_slots)}
    judge(kda_update, sample_of(kda_update, "base", null_slot=0, **tables), with_scratch)
    [call] = calls
    assert call["initial_state_source"] is not None


@pytest.mark.parametrize("null_slot", [-1, 3])
def test_padding_without_write_slots_needs_no_spare_slot(calls: Calls, null_slot: int) -> None:
    sample = sample_of(kda_update, "base", slots=torch.tensor([-1, 0, 3]), null_slot=null_slot)
    judge(kda_update, sample, front_on(kda_update, "flashinfer"))


@pytest.mark.parametrize("written", [None, ((5, 8), (0, 6), (7, 4))])
def test_speculation(calls: Calls, written: tuple[tuple[int, int], ...] | None) -> None:
    """Rows start from several columns, one of them is padding, and one state has no place."""
    slots = torch.tensor([(1, 2, 3), (4, 0, 6), (0, 7, 8)])
    table = None if written is None else torch.tensor(written).t().contiguous().t()  # its columns lie together
    accepted = torch.tensor([2, 3, 1], dtype=torch.int32)
    changes: dict[str, Any] = {"slots": slots, "write_slots": table, "num_accepted_tokens": accepted, "null_slot": 0}
    sample = sample_of(kda_update, "speculative, write slots", **changes)
    judge(kda_update, sample, with_scratch)
    [call] = calls
    assert call["num_spec_tokens"] == 1


def test_one_token_of_a_speculative_decode(calls: Calls) -> None:
    slots, accepted = torch.tensor([(1, 2), (4, 5), (7, 8)]), torch.tensor([2, 1, 0])
    sample = sample_of(kda_update, "base", slots=slots, num_accepted_tokens=accepted, null_slot=0)
    judge(kda_update, sample, with_scratch)


def test_no_rows(calls: Calls) -> None:
    tokens = dict.fromkeys(("q", "k", "v", "a", "b"), lambda t: t[:0])
    judge(kda_update, sample_of(kda_update, "base", slots=None, **tokens), front_on(kda_update, "flashinfer"))
    assert calls == []


def test_activations_may_lie_anywhere(calls: Calls) -> None:
    sample = sample_of(kda_update, "base", q=shifted, a=shifted, A_log=lambda t: torch.cat((t[:1], t))[1:])
    judge(kda_update, sample, front_on(kda_update, "flashinfer"))


REFUSED_UPDATES: list[tuple[dict[str, Any], str]] = [
    ({"q": lambda q: q.half()}, "takes a bfloat16 q, and it is float16"),
    ({"k": lambda k: k.float()}, "takes k in q's bfloat16, and it is float32"),
    ({"a": lambda a: a.float()}, "takes a in q's bfloat16, and it is float32"),
    ({"b": lambda b: b.float()}, "takes b in q's bfloat16, and it is float32"),
    ({"ssm_state": lambda s: s.float()}, "takes a bfloat16 state, and it is float32"),
    (
        {"q": lambda q: q[:, :2], "k": lambda k: k[:, :2]},
        "computes the gates of heads of k, and there are 2 of these and 4 of v; give g and beta",
    ),
    ({"slots": None, "write_slots": torch.tensor([6, 4, 7])}, "takes write_slots together with slots"),
    ({"write_slots": torch.tensor([6, 4, 7])}, SPARE.format(-1)),
    (
        {"ssm_state": lambda s: s.mT.contiguous().mT},
        "takes a state whose slots are each dense, and its strides are (16384, 4096, 1, 64)",
    ),
    ({"ssm_state": shifted}, "takes a state whose slots start at multiples of 16 bytes, and not all of them do"),
    (
        {"out": lambda _: torch.zeros(3, 64, 4).bfloat16().mT},
        "takes an out that is contiguous and starts at a multiple of 16 bytes",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED_UPDATES)
def test_the_update_refuses_in_a_sentence(calls: Calls, changes: dict[str, Any], sentence: str) -> None:
    assert refused(kda_update, sample_of(kda_update, "base", **changes)) == sentence
    assert calls == []


@pytest.mark.parametrize(
    ("length", "columns", "sentence"),
    [
        (2, 1, "takes as many columns of write_slots as a row has tokens, and they are 1 and 2"),
        (17, 17, "takes at most 16 tokens a row, and there are 17"),
    ],
)
def test_the_update_refuses_rows(calls: Calls, length: int, columns: int, sentence: str) -> None:
    longer = dict.fromkeys(("q", "k", "v", "a", "b"), lambda t: t[:, :1].expand(-1, length, *t.shape[2:]))
    slots, written = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, columns, dtype=torch.int32)
    sample = sample_of(kda_update, "speculative, write slots", slots=slots, write_slots=written, **longer)
    assert refused(kda_update, sample) == sentence
    assert calls == []


@pytest.mark.parametrize(("dims", "sentence"), [((64, 128), "64 and 128"), ((32, 32), "32 and 32")])
def test_the_update_refuses_sizes(calls: Calls, dims: tuple[int, int], sentence: str) -> None:
    k_dim, v_dim = dims
    sample = kda_update.make_samples("cpu", k_dim=k_dim, v_dim=v_dim, state_dtype=torch.bfloat16)[0]
    assert refused(kda_update, sample) == (f"takes a k_dim and a v_dim of both 64 or both 128, and they are {sentence}")


NO_PREFILL = {"packed, empty rows": "takes out in q's bfloat16, and it is float32"}


@pytest.mark.parametrize("name", [sample.name for sample in samples_of(chunk_kda)])
def test_the_prefill(calls: Calls, name: str) -> None:
    sample = sample_of(chunk_kda, name)
    if name in NO_PREFILL:
        assert refused(chunk_kda, sample) == NO_PREFILL[name]
        out = torch.zeros(sample.kwargs["out"].shape, dtype=torch.bfloat16)
        sample = sample_of(chunk_kda, name, out=out)
    judge(chunk_kda, sample, front_on(chunk_kda, "flashinfer"))
    [call] = calls
    assert call["batch_invariant"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"q": lambda q: q.float()}, "takes a bfloat16 q, and it is float32"),
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
def test_the_prefill_refuses(calls: Calls, changes: dict[str, Any], sentence: str) -> None:
    assert refused(chunk_kda, sample_of(chunk_kda, "base", **changes)) == sentence
    assert calls == []


def without(op: Op[...], monkeypatch: pytest.MonkeyPatch, *missing: str) -> str:
    """How a call is refused where modules are missing; put back before the stand-in is taken away."""
    needed = {"cutlass", "cudnn"}.difference(missing)
    with stand_in.installed(needed=sorted(needed)), monkeypatch.context() as patch:
        for name in missing:
            patch.delitem(sys.modules, name, raising=False)
        registry.dispatcher.dispatcher.changed()
        return refused(op, samples_of(op)[0])


@pytest.mark.parametrize("op", [kda_update, chunk_kda], ids=lambda op: op.name)
def test_what_kda_needs(
    op: Op[...], calls: Calls, capability: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install = "for KDA, which is not installed; pip install 'mamba-ops[flashinfer]'"
    assert without(op, monkeypatch, "cutlass") == f"needs nvidia-cutlass-dsl {install}"
    if op is chunk_kda:
        assert without(op, monkeypatch, "cudnn") == f"needs nvidia-cudnn-frontend {install}"
    says = {
        kda_update: "takes GPUs from compute capability 10.0 on, and this one has 9.0",
        chunk_kda: "takes GPUs of compute capability 10, and this one has 9.0",
    }
    capability(9, 0)
    registry.dispatcher.dispatcher.changed()
    assert refused(op, samples_of(op)[0]) == says[op]


def test_a_prefill_takes_no_newer_gpu(calls: Calls, capability: Callable[[int, int], None]) -> None:
    capability(12, 0)
    expected = "takes GPUs of compute capability 10, and this one has 12.0"
    assert refused(chunk_kda, samples_of(chunk_kda)[0]) == expected


def test_benchmarks_call_the_vendors_functions_as_the_adapters_do(calls: Calls) -> None:
    """Through the op and directly, both give what the reference does, within bfloat16."""
    cpu = torch.device("cpu")
    update = _in_bfloat16(update_case(3, cpu, scale=SMALL), "q", "k", "v", "a", "b")
    with pytest.raises(NotTaken, match="takes a bfloat16 state"):
        peers.of(kda_update)["FlashInfer"](update)
    update = replace(update, caches={"ssm_state": update.cache.bfloat16()})
    prefill = _in_bfloat16(prefill_case((3, 2), cpu, scale=LARGE), "q", "k", "v", "beta")
    pairs = [
        (update, _twice(peers.of(kda_update)["FlashInfer"](update))),
        (prefill, peers.of(chunk_kda)["FlashInfer"](prefill)),
    ]
    for case, direct in pairs:
        expected, errors = case.expected(), []
        with use_backend("flashinfer"):
            for call in (case.ours(), direct.checked):
                found = run.check(case, call, expected, runs=1)
                assert found.error < run.AGREEMENT
                assert found.steady
                assert found.kept
                errors.append(found.error)
        assert errors[0] == errors[1]
        direct.timed(case.caches, case.tables[0])
    assert len(calls) == 6


def _in_bfloat16(case: Case, *names: str) -> Case:
    """A case as it is on a GPU; on a CPU cases are in float32."""
    changed = {name: case.arguments[name].bfloat16() for name in names}
    return replace(case, arguments=case.arguments | changed, out=case.out.bfloat16())


def _twice(call: peers.Call) -> peers.Calls:
    return peers.Calls(call, call)
