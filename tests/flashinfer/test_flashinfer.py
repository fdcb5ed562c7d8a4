"""The flashinfer backend on a stand-in for the vendor's package (see stand_in.py): what the adapters say, and refuse.

These tests run no kernel of the vendor's. On a GPU with FlashInfer installed the tests of all ops do: they run over
every op x backend x sample.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_ops
from mamba_ops import chunk_gated_delta_rule, gated_delta_rule_update, selective_state_update, use_backend
from mamba_ops.backends.flashinfer import vendor
from mamba_ops.registry import NoBackendError, Op, Sample
from tests.flashinfer import stand_in
from tests.harness import SIZES, front_on, judge, refusal

flashinfer = vendor.flashinfer
Calls = list[dict[str, Any]]
UPDATES = [selective_state_update, gated_delta_rule_update, chunk_gated_delta_rule]


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Say what GPU this is to be."""

    def be(*numbers: int) -> None:
        monkeypatch.setattr(vendor, "capability", lambda device: numbers)

    be(9, 0)
    return be


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, capability: Callable[[int, int], None]) -> Iterator[Calls]:
    """The stand-in in place, and the backend let loose on CPU tensors."""
    monkeypatch.setattr(flashinfer, "devices", ("cpu",))
    monkeypatch.setattr(flashinfer, "_import_problem", lambda: None)
    with stand_in.installed() as seen:
        yield seen


def samples_of(op: Op[...], **sizes: Any) -> list[Sample]:
    return op.make_samples("cpu", **SIZES["flashinfer", op.name] | sizes)


def sample_of(op: Op[...], name: str, **changes: Any) -> Sample:
    """A sample by name, with some arguments changed: to a value, or by a function of what it was."""
    sizes = {key: changes.pop(key) for key in ("dtype", "state_dtype", "heads", "groups", "dim") if key in changes}
    [sample] = [s for s in samples_of(op, **sizes) if s.name == name]
    names = [p.name for p in op.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    arguments = dict(zip(names, sample.args, strict=False)) | dict(sample.kwargs)
    for key, change in changes.items():
        arguments[key] = change(arguments.get(key)) if callable(change) else change
    return Sample(name, tuple(arguments.pop(key) for key in names), arguments)


def refused(op: Op[...], sample: Sample) -> str:
    """The sentence with which a call is refused, from the error that the user sees; nothing is touched."""
    call = sample.clone()
    with use_backend("flashinfer"), pytest.raises(NoBackendError) as raised:
        op(*call.args, **call.kwargs)
    for before, after in zip((*sample.args, *sample.kwargs.values()), (*call.args, *call.kwargs.values()), strict=True):
        assert not isinstance(before, Tensor) or torch.equal(before, after)
    return str(raised.value).splitlines()[1].removeprefix("  flashinfer  ")


# ---- selective_state_update ------------------------------------------------------------------------------------------

WHOLE_HEAD = "takes one {0} for a whole head, and {0} has one for every channel"
NOT_TAKEN = {
    "per-channel dt": WHOLE_HEAD.format("dt"),
    "per-channel D and bias": WHOLE_HEAD.format("D"),
    **dict.fromkeys(
        ("full A", "nothing tied", "mamba1", "mamba1 gate", "packed mamba1", "everything"),
        "takes one A for a whole head, as Mamba-2 has it, and A has one for every channel and entry of the state",
    ),
    "float32 output": "takes out in x's bfloat16, and it is float32",
    "transposed state": "takes a state whose slots are each dense, and its strides are (16384, 4096, 1, 64)",
    "transposed x": "takes an out that is contiguous, and its strides are (1, 3, 12)",
    "rows of two tokens, by token": "takes an out that is contiguous, and its strides are (256, 768, 64, 1)",
    **dict.fromkeys(
        ("packed", "packed, empty and null rows", "packed, tokens past the end"),
        "takes packed rows in speculative decoding alone, where a table's columns say how long one can be",
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
    assert [call["pad_slot_id"] for call in calls] == [-1, 0]
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
    sample = sample_of(selective_state_update, "speculative rows", **tables)
    judge(selective_state_update, sample, front_on(selective_state_update, "flashinfer"))


def test_a_projections_views(calls: Calls) -> None:
    sample = sample_of(selective_state_update, "views of a projection")
    judge(selective_state_update, sample, front_on(selective_state_update, "flashinfer"))
    assert calls[0]["B"].stride() == (512, 64, 1)


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers, 8 bytes further than they may be."""
    room = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    start = (-room.data_ptr() % 64 + 8) // tensor.itemsize
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def apart(tensor: Tensor) -> Tensor:
    """The same numbers, with two more bytes or so from one token to the next."""
    padded = torch.nn.functional.pad(tensor.flatten(1), (0, 1))
    return padded[:, :-1].unflatten(1, tensor.shape[1:])


def double(tensor: Tensor) -> Tensor:
    return tensor.double()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("base", {"x": double}, "computes in float32, and x is float64"),
    ("base", {"state": double}, "computes in float32, and state is float64"),
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
        {"state": lambda s: s[:2], "slots": [0, -1, 1]},
        "takes no more rows than state has slots, and there are 3 rows and 2 slots",
    ),
    (
        "speculative rows",
        {"groups": 1, "heads": 3},
        "takes 1, 2, 4, 8, 16, 32 or 64 heads a group for this call, and there are 3",
    ),
    ("base", {"state": shifted}, "takes a state whose slots start at multiples of 16 bytes, and not all of them do"),
    ("base", {"state": apart}, "takes a state whose slots start at multiples of 16 bytes, and not all of them do"),
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
    monkeypatch.setitem(flashinfer.settings, "algorithm", algorithm)
    sample = sample_of(selective_state_update, name)
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


# ---- the gated delta rule --------------------------------------------------------------------------------------------

NO_UPDATE = {
    "gates given": "computes the gates itself, from a, b, A_log and dt_bias, and g and beta are given",
    "not normalised, turned state": "computes the gates itself, from a, b, A_log and dt_bias, and g and beta are given",
    "null rows, write slots": (
        "runs rows that are nobody in slot 0 where the state is bfloat16 or there are write slots, and null_slot is 7; "
        "keep slot 0 free and say null_slot=0"
    ),
    "packed, empty row": "takes out in q's bfloat16, and it is float32",
    "speculative": "takes no packed rows",
    "speculative, write slots": "does no speculative decoding",
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
    dense: dict[str, Any] = {"state": lambda s: s.contiguous(), "state_dtype": state_dtype, "null_slot": 0}
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
    ({"state": lambda s: s.half()}, "takes a float32 or bfloat16 state, and it is float16"),
    ({"slots": None, "write_slots": torch.tensor([6, 4, 7])}, "takes write_slots together with slots"),
    (
        {"state": lambda s: s.bfloat16()},
        (
            "runs rows that are nobody in slot 0 where the state is bfloat16 or there are write slots, and null_slot "
            "is -1; keep slot 0 free and say null_slot=0"
        ),
    ),
    (
        {"state": lambda s: s.mT.contiguous().mT},
        "takes a state whose slots are each dense, and its strides are (65536, 16384, 1, 128)",
    ),
    ({"state": shifted}, "takes a state whose slots start at multiples of 32 bytes, and not all of them do"),
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
        out = torch.zeros_like(sample.kwargs["out"], dtype=torch.bfloat16)
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
    with stand_in.installed(cutlass=False):
        monkeypatch.delitem(stand_in.sys.modules, "cutlass", raising=False)
        assert refused(op, sample) == (
            "needs nvidia-cutlass-dsl for the gated delta rule, which is not installed; "
            "pip install 'mamba-ops[flashinfer]'"
        )
    capability(8, 9)
    mamba_ops.registry.selection.changed()
    assert refused(op, sample) == "takes GPUs from compute capability 9.0 on, and this one has 8.9"


# ---- the package -----------------------------------------------------------------------------------------------------


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend let loose on CPU tensors, its import not yet tried."""
    monkeypatch.setattr(flashinfer, "devices", ("cpu",))
    monkeypatch.setattr(flashinfer, "_import_problem", flashinfer._try_import)


def base_refused() -> str:
    mamba_ops.registry.selection.changed()
    return refused(selective_state_update, sample_of(selective_state_update, "base"))


@pytest.mark.usefixtures("unasked")
def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "requires", "flashinfer_that_is_not_there")
    assert base_refused() == "flashinfer_that_is_not_there is not installed; pip install 'mamba-ops[flashinfer]'"


@pytest.mark.usefixtures("unasked")
def test_a_broken_package(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_flashinfer.py").write_text("import tvm_ffi_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flashinfer, "requires", "broken_flashinfer")
    with pytest.warns(
        RuntimeWarning, match="backend flashinfer: broken_flashinfer is installed but cannot be imported"
    ):
        assert base_refused() == (
            "broken_flashinfer is installed but cannot be imported: ModuleNotFoundError: No module named "
            "'tvm_ffi_that_is_not_there'; pip install 'mamba-ops[flashinfer]' has what it needs"
        )


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(("version", "fine"), [("0.7.1", False), ("0.6.18rc1", False), ("0.7.2", True), ("0.10", True)])
def test_versions(version: str, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor, "capability", lambda device: (9, 0))
    monkeypatch.setenv("CUDA_HOME", "/usr/local/cuda")
    sentence = (
        f"flashinfer {version} is installed, and 0.7.2 is the oldest that will do; "
        "pip install -U 'mamba-ops[flashinfer]'"
    )
    with stand_in.installed(version):
        assert flashinfer._try_import() == (None if fine else sentence)
        if not fine:
            assert base_refused() == sentence


@pytest.mark.usefixtures("unasked")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(vendor.shutil, "which", lambda name: None)
    monkeypatch.setattr(vendor.Path, "exists", lambda path: False)
    with stand_in.installed():
        assert base_refused() == (
            "flashinfer compiles its kernels, and there is no CUDA compiler (nvcc) here; install CUDA's toolkit, "
            "or pip install 'mamba-ops[flashinfer]' flashinfer-jit-cache"
        )


def test_the_stand_in_has_the_vendors_signatures() -> None:
    """Where the real package is installed."""
    mamba = pytest.importorskip("flashinfer.mamba")
    decode = pytest.importorskip("flashinfer.gdn_decode")
    pairs = [
        (mamba.selective_state_update, stand_in.selective_state_update),
        (decode.gated_delta_rule_decode_pretranspose, stand_in.gated_delta_rule_decode_pretranspose),
    ]
    for real, ours in pairs:
        theirs, mine = (inspect.signature(f).parameters.values() for f in (real, ours))
        assert [(p.name, p.kind, p.default) for p in theirs] == [(p.name, p.kind, p.default) for p in mine]


@pytest.mark.parametrize("op", UPDATES, ids=lambda op: op.name)
def test_some_samples_are_taken(op: Op[...], calls: Calls) -> None:
    """Else the tests of all ops would say nothing about this backend."""
    assert sum(refusal(op, "flashinfer", sample) is None for sample in samples_of(op)) >= 2
