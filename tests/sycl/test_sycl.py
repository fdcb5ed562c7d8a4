"""The sycl backend on a stand-in for the vendor's op (see stand_in.py): what the adapter says to it, and refuses.

These tests run no kernel of the vendor's.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import gdn_mixing, use_backend
from mamba_ops.backends.sycl import sycl
from mamba_ops.registry import NoBackendError, Sample
from tests.harness import judge
from tests.sycl import stand_in

Calls = list[dict[str, Any]]
SIZES = {"head_k_dim": 32, "head_v_dim": 32}


@pytest.fixture(params=["new", "old"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def vendor(form: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The stand-in in place, and the backend let loose on CPU tensors."""
    monkeypatch.setattr(sycl, "devices", ("cpu",))
    monkeypatch.setattr(sycl, "_import_problem", lambda: None)
    with stand_in.installed(form) as calls:
        yield calls


def sample_of(name: str, **sizes: Any) -> Sample:
    """A sample as the vendor takes it: one dtype, a window of width - 1, and a slot to spare."""
    sample = next(s for s in gdn_mixing.make_samples("cpu", **SIZES | sizes) if s.name == name)
    arguments = bound(sample)
    dtype = arguments["projected_qkvz"].dtype
    history = arguments["conv_weight"].shape[1] - 1
    arguments["conv_weight"] = arguments["conv_weight"].to(dtype)
    arguments["dt_bias"] = arguments["dt_bias"].to(dtype)
    conv_state: Tensor = arguments["conv_state"]
    arguments["conv_state"] = conv_state.mT[:, :history].contiguous().mT
    if arguments["null_slot"] < 0:
        arguments["null_slot"] = 0
    if arguments["out"] is not None:
        arguments["out"] = arguments["out"].to(dtype)
    return as_sample(name, arguments)


def bound(sample: Sample) -> dict[str, Any]:
    arguments = gdn_mixing.bind(sample.args, sample.kwargs)
    return arguments | {"out": sample.kwargs.get("out")}


def as_sample(name: str, arguments: dict[str, Any]) -> Sample:
    """The call with these arguments, by the op's order."""
    keywords = {key: arguments[key] for key in ("z", "null_slot", "out") if arguments[key] is not None}
    positional = [p.name for p in gdn_mixing.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return Sample(name, tuple(arguments[key] for key in positional), keywords)


def on_sycl(*args: Any, **kwargs: Any) -> Tensor:
    """The op on the stand-in, with what it left in the null slot, which is scratch there, taken out again."""
    arguments = gdn_mixing.bind(args, kwargs)
    caches = [arguments["conv_state"], arguments["ssm_state"]]
    before = [cache[arguments["null_slot"]].clone() for cache in caches]
    with use_backend("sycl"):
        result = gdn_mixing(*args, **kwargs)
    for cache, was in zip(caches, before, strict=True):
        cache[arguments["null_slot"]] = was
    return result


PLAIN = ("base", "decodes", "prefills", "padding rows", "padded")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_it_is_right_by_the_oracle(vendor: Calls, name: str, dtype: torch.dtype) -> None:
    judge(gdn_mixing, sample_of(name, dtype=dtype), on_sycl)
    assert len(vendor) == 1


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("gate", [None, torch.bfloat16, torch.float32], ids=str)
def test_both_layouts_with_and_without_a_gate(vendor: Calls, interleaved: bool, gate: torch.dtype | None) -> None:
    arguments = bound(sample_of("base")) | {"interleaved": interleaved}
    if gate is not None:
        arguments["z"] = torch.randn(25, 4, 32).to(gate)
    judge(gdn_mixing, as_sample("base", arguments), on_sycl)
    assert vendor[0]["reorder_input"] is not interleaved


@pytest.mark.parametrize("name", ["no rows", "no plan"])
def test_without_rows_the_vendor_is_not_called(vendor: Calls, name: str) -> None:
    judge(gdn_mixing, sample_of(name), on_sycl)
    assert vendor == []


def test_strides_and_dtypes_that_it_converts(vendor: Calls) -> None:
    arguments = bound(sample_of("base"))
    for name in ("projected_qkvz", "projected_ba", "conv_weight"):
        arguments[name] = torch.cat([arguments[name]] * 2, dim=-1)[:, : arguments[name].shape[1]]
    arguments["out"], arguments["z"] = (torch.randn(25, 4, 64).bfloat16()[..., ::2] for _ in range(2))
    arguments["A_log"] = arguments["A_log"].half()
    arguments["ssm_state"] = torch.cat([arguments["ssm_state"]] * 2, dim=1)[:, :4]
    judge(gdn_mixing, as_sample("base", arguments), on_sycl)


def test_decodes_go_on_whatever_the_plan_says_of_them(vendor: Calls) -> None:
    arguments = bound(sample_of("base"))
    arguments["has_initial_state"] = arguments["has_initial_state"].clone()
    arguments["has_initial_state"][:2] = False
    judge(gdn_mixing, as_sample("base", arguments), on_sycl)


def test_an_empty_row_that_would_begin_anew_keeps_its_slot(vendor: Calls) -> None:
    arguments = bound(sample_of("prefills"))
    arguments["has_initial_state"] = torch.zeros_like(arguments["has_initial_state"])
    judge(gdn_mixing, as_sample("prefills", arguments), on_sycl)


def test_what_padding_left_in_the_spare_slot_reaches_no_output(vendor: Calls) -> None:
    sample = sample_of("padding rows")
    spoilt = sample.clone()
    for name in ("conv_state", "ssm_state"):
        bound(spoilt)[name][8] = torch.nan
    clean, other = (on_sycl(*call.args, **call.kwargs) for call in (sample.clone(), spoilt))
    assert torch.equal(clean, other)


# -- speculative decodes ----------------------------------------------------------------------------------------------


def speculative(slots: list[list[int]], accepted: list[int]) -> tuple[Sample, Sample]:
    """One call on either layout of the convolution's cache: two decodes of three tokens, then two prefills."""
    sample = sample_of("speculative")
    arguments = bound(sample) | {"z": torch.zeros(16, 4, 32, dtype=torch.bfloat16)}
    random = torch.Generator().manual_seed(3)
    for name in ("projected_qkvz", "projected_ba"):
        shape = (16, arguments[name].shape[1])
        arguments[name] = torch.randn(shape, generator=random).bfloat16()
    arguments["counts"] = torch.tensor([2, 6, 2, 9])
    arguments["cu_seqlens"] = torch.tensor([0, 3, 6, 10, 15, 15, 15, 15], dtype=torch.int32)
    arguments["slots"] = torch.tensor([*slots, [7, 0, 0], [8, 0, 0], *[[0, 0, 0]] * 3])
    arguments["num_accepted_tokens"] = torch.tensor(accepted + [1] * 5)
    windows: Tensor = arguments["conv_state"]
    rolling = torch.randn(*windows.shape[:2], 5, generator=random).bfloat16()
    rolling[:, :, :3] = windows
    for row, kept in ((row, kept) for row, kept in zip(slots, accepted, strict=True) if row[0] >= 0):
        rolling[row[0], :, kept - 1 : kept + 2] = windows[row[kept - 1]]
    return as_sample("windows", arguments), as_sample("rolling", arguments | {"conv_state": rolling})


@pytest.mark.parametrize("form", ["new"], indirect=True)
@pytest.mark.parametrize("accepted", [[2, 1], [3, 2]])
@pytest.mark.parametrize("slots", [[[1, 2, 3], [4, 5, 6]], [[0, 0, 0], [4, 5, 6]], [[1, 2, 3], [-1, -1, -1]]], ids=str)
def test_speculative_decodes(vendor: Calls, slots: list[list[int]], accepted: list[int]) -> None:
    mine, composed = speculative(slots, accepted)
    active = [i for i, row in enumerate(slots) if row[0] > 0]
    truth = composed.clone()

    def front(*args: Any, **kwargs: Any) -> None:
        """On the vendor's layout of the cache, with the results in the other's, by which the oracle judges."""
        given, call = bound(Sample("", args, kwargs)), mine.clone()
        arguments = bound(call)
        for name in ("ssm_state", "z", "out"):
            arguments[name] = given[name]
        on_sycl(*as_sample("", arguments).args, z=arguments["z"], null_slot=0, out=arguments["out"])
        windows, rolling = arguments["conv_state"], given["conv_state"]
        for i in active:
            for t, slot in enumerate(slots[i]):
                rolling[slots[i][0], :, t : t + 3] = windows[slot]
        for slot in (7, 8):
            rolling[slot, :, :3] = windows[slot]

    judge(gdn_mixing, truth, front)
    [call] = vendor
    assert (call["num_spec_decodes"], call["num_decodes"], call["num_prefills"]) == (2, 0, 2)


@pytest.mark.parametrize("form", ["new"], indirect=True)
@pytest.mark.parametrize(
    ("slots", "told"),
    [
        ([[1, 2, 3], [4, 5, -1]], [[1, 2, 3], [4, 5, 0]]),  # a state that is not stored
        ([[-1, -1, 3], [4, 5, 6]], [[0, 0, 0], [4, 5, 6]]),  # padding
    ],
)
def test_what_goes_to_the_spare_slot(vendor: Calls, slots: list[list[int]], told: list[list[int]]) -> None:
    call, _ = speculative(slots, [2, 1])
    on_sycl(*call.args, **call.kwargs)
    assert vendor[0]["spec_state_indices_tensor"].tolist() == told


@pytest.mark.parametrize("form", ["new"], indirect=True)
def test_speculative_plans_without_decodes(vendor: Calls) -> None:
    arguments = bound(sample_of("prefills"))
    arguments["num_accepted_tokens"] = torch.ones(3, dtype=torch.int32)
    judge(gdn_mixing, as_sample("prefills", arguments), on_sycl)
    assert vendor[0]["num_spec_decodes"] == 0


# -- refusals ---------------------------------------------------------------------------------------------------------


def refusal(sample: Sample) -> str:
    """Why the backend does not take a call; the call must have written nothing."""
    call = sample.clone()
    with use_backend("sycl"), pytest.raises(NoBackendError) as raised:
        gdn_mixing(*call.args, **call.kwargs)
    for before, after in zip(sample.args, call.args, strict=True):
        assert not isinstance(before, Tensor) or torch.equal(before, after)
    return str(raised.value).splitlines()[1].removeprefix("  sycl  ")


def converted(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


REFUSED = [
    ("projected_qkvz", converted(torch.float32), "takes float16 and bfloat16, and projected_qkvz is float32"),
    *(
        (name, converted(torch.float32), f"takes {name} in projected_qkvz's bfloat16, and it is float32")
        for name in ("projected_ba", "conv_state", "conv_weight")
    ),
    ("out", lambda out: torch.zeros(25, 4, 32), "takes out in projected_qkvz's bfloat16, and it is float32"),
    (
        "conv_bias",
        lambda bias: torch.zeros(256),
        "takes conv_bias in projected_qkvz's bfloat16, and it is float32",
    ),
    ("ssm_state", converted(torch.float64), "computes in float32, and ssm_state is float64"),
    (
        "conv_weight",
        lambda weight: weight.repeat(1, 2)[:, :6],
        "takes a convolution of width 5 at most, and conv_weight has 6",
    ),
    (
        "conv_state",
        lambda state: torch.cat([state, state], dim=2)[..., :5],
        "keeps 3 inputs in every slot, and conv_state has a state_len of 5",
    ),
    (
        "null_slot",
        lambda slot: -1,
        "runs padding rows in a spare slot, and null_slot is -1; use a slot of the caches",
    ),
    ("null_slot", lambda slot: 9, "runs padding rows in a spare slot, and null_slot is 9 of 9 slots"),
    (
        "conv_state",
        lambda state: state.contiguous(),
        "takes a conv_state with adjacent channels, a view (slots, state_len, dim) transposed",
    ),
    (
        "ssm_state",
        lambda state: state.mT.contiguous().mT,
        "takes an ssm_state with contiguous slots",
    ),
]


@pytest.mark.parametrize(
    ("name", "change", "sentence"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_it_refuses_in_a_sentence(vendor: Calls, name: str, change: Callable[[Any], Any], sentence: str) -> None:
    arguments = bound(sample_of("base"))
    arguments[name] = change(arguments[name])
    if name == "conv_weight" and arguments[name].shape[1] == 6:  # the op itself wants as many inputs kept
        arguments["conv_state"] = arguments["conv_state"].mT.repeat(1, 2, 1)[:, :5].mT
    assert refusal(as_sample("base", arguments)) == sentence
    assert vendor == []


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"head_k_dim": 16}, "takes a head_k_dim of 32, 64, 128 or 256, and it is 16"),
        ({"head_v_dim": 48}, "takes a head_v_dim that 32 divides, and it is 48"),
        ({"num_v_heads": 2}, "takes a num_v_heads that 4 divides, and it is 2"),
    ],
)
def test_it_refuses_sizes(vendor: Calls, sizes: dict[str, int], sentence: str) -> None:
    assert refusal(sample_of("base", **sizes)) == sentence


def test_it_refuses_speculative_decodes_of_unequal_lengths_or_any_in_the_old_form(vendor: Calls, form: str) -> None:
    arguments = bound(speculative([[1, 2, 3], [4, 5, 6]], [2, 1])[0])
    arguments["counts"] = torch.tensor([2, 5, 2, 9])
    arguments["cu_seqlens"] = torch.tensor([0, 3, 5, 9, 14, 14, 14, 14], dtype=torch.int32)
    sentence = {
        "new": "takes 3 tokens of every speculative decode, and 2 have 5",
        "old": "the installed vllm_xpu_kernels does no speculative decoding; 0.1.9 does",
    }
    assert refusal(as_sample("unequal", arguments)) == sentence[form]


def test_it_refuses_where_the_package_lacks_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sycl, "devices", ("cpu",))
    monkeypatch.setattr(sycl, "_import_problem", lambda: None)
    assert refusal(sample_of("base")) == "the installed vllm_xpu_kernels has no gdn_attention"


def test_the_composed_path_says_that_it_needs_a_longer_cache() -> None:
    mine, _ = speculative([[1, 2, 3], [4, 5, 6]], [2, 1])
    call = mine.clone()
    with pytest.raises(ValueError, match="conv_state: got state_len 3, expected at least 5"):
        gdn_mixing(*call.args, **call.kwargs)
    assert torch.equal(bound(call)["conv_state"], bound(mine)["conv_state"])
    assert torch.equal(bound(call)["ssm_state"], bound(mine)["ssm_state"])


def test_importing_us_imports_nothing_of_the_vendor() -> None:
    code = "import sys, mamba_ops, mamba_ops.backends.sycl; print([m for m in sys.modules if 'xpu_kernels' in m])"
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
