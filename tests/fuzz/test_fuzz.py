"""Random calls: a few every day, more in `make test-all`, as many as one likes with `python -m tests.fuzz`."""

import collections
import contextlib
import inspect
import os
import random
import re
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd.forward_ad import unpack_dual

import mamba_ops
from mamba_ops import functional, registry
from mamba_ops.compat import causal_conv1d, fla, mamba_ssm, vllm
from mamba_ops.layers.mixer import Mixer
from mamba_ops.registry import Op
from mamba_ops.registry.dispatcher import dispatcher
from mamba_ops.serving import PrefixCache, StatePool
from tests.fuzz import plans
from tests.fuzz.calls import TRANSFORMS, all_targets, call_of, one_call
from tests.fuzz.mutations import Pick, in_memory_of
from tests.fuzz.outcomes import NO_TRUTH, REFUSED, RIGHT, Wrong, no_numbers, outcome
from tests.fuzz.targets import Target


@pytest.fixture(autouse=True, scope="module")
def _no_process_group() -> Iterator[None]:
    """Leave no group of processes behind, which DTensors need."""
    yield
    if torch.distributed.is_initialized():
        from tests.fuzz import mutations

        torch.distributed.destroy_process_group()
        mutations._mesh.cache_clear()


def draws(data: Any) -> Pick:
    return lambda count: data.draw(st.integers(0, count - 1))


def run(count: int, backend: str) -> None:
    ends: collections.Counter[str] = collections.Counter()

    @hypothesis.settings(max_examples=count, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.data())
    def calls(data: Any) -> None:
        ends[one_call(draws(data), backend)[1]] += 1

    calls()
    assert ends.total() >= count
    assert min(ends[RIGHT], ends[REFUSED]) > count // 10  # both kinds of calls were made
    assert ends[NO_TRUTH] < count // 5


def test_a_few_calls() -> None:
    run(60, "torch")


@pytest.mark.slow
@pytest.mark.parametrize(("count", "backend"), [(1500, "torch"), (150, "triton")])
def test_many_calls(count: int, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    run(count, backend)


# -- what it calls ----------------------------------------------------------------------------------------------------


def test_everything_that_users_call_is_called() -> None:
    """Every op and companion, layer, functional entry, and function of `compat`."""
    called = {target.name for target in all_targets("torch")}
    expected = {op.name for op in registry.ops().values() if op.qualname.startswith("mamba_ops::")}
    mixers = {n for n, v in vars(mamba_ops.layers).items() if inspect.isclass(v) and issubclass(v, Mixer)}
    expected |= mixers
    for module in (functional, causal_conv1d, fla, mamba_ssm, vllm):
        homes = re.compile(rf"{module.__name__}(\..*|_delta_rule|_chunks)?")
        own = {n for n, f in vars(module).items() if inspect.isfunction(f) and homes.fullmatch(f.__module__)}
        # references, and the names of an extension, call the others
        expected |= {name for name in own if not name.startswith("_") and not name.endswith(("_ref", "_function"))}
    assert called == expected
    with_gradients = collections.Counter(t.name for t in all_targets("torch") if t.returns_gradients)
    trained = [op for op in registry.ops().values() if op.backward_op is not None]
    assert trained
    for op in trained:
        assert with_gradients[op.name] >= 2  # the op itself, and its functional entry
        assert with_gradients[op.backward_op.name] == 1
    assert {*mixers, "mamba_split_conv1d_scan_combined"} < with_gradients.keys()


@pytest.mark.parametrize("target", all_targets("torch"), ids=lambda t: t.name)
def test_every_right_call_is_right(target: Target) -> None:
    """And compares something with the truth."""
    arguments = target.bases[0]()
    with torch.set_grad_enabled(target.records):
        assert outcome(target, arguments, {n: type(a) for n, a in arguments.items()}, is_right=True) == RIGHT


def named(target: Target) -> str:
    return target.name


def changed(target: Target, change: dict[str, Any], base: int = 0) -> str:
    """How a call of a target with other arguments ends."""
    arguments = target.bases[base]()
    types, had = {n: type(a) for n, a in arguments.items()}, no_numbers(arguments)
    with torch.set_grad_enabled(target.records):
        return outcome(target, {**arguments, **change}, types, had_no_numbers=had)


@pytest.mark.parametrize("target", all_targets("torch"), ids=lambda t: t.name)
def test_a_number_whose_value_is_not_there_is_named(target: Target) -> None:
    """Where a number stands, a tensor that has none is refused in a sentence, or taken where nothing reads it."""
    numbers = [n for n, a in target.bases[0]().items() if isinstance(a, (bool, int, float))]
    for name in numbers:
        for value in (torch.tensor(2), torch.tensor(0.5)):
            for absent in (FakeTensorMode().from_tensor(value), value.to("meta")):
                assert changed(target, {name: absent}) in (REFUSED, NO_TRUTH)


@pytest.mark.parametrize("target", [t for t in all_targets("torch") if t.name == "mamba_chunk_scan"])
def test_nothing_is_claimed_of_what_float32_overflows_on_the_way_to(target: Target) -> None:
    """Steps of the largest float32: x times a step is an infinity, times a zero of C a NaN, where the truth is 0."""
    C = target.bases[0]()["C"]
    assert changed(target, {"dt_min": 1.0, "C": torch.zeros_like(C)}) == RIGHT
    largest = torch.finfo(torch.float32).max
    assert changed(target, {"dt_min": largest, "C": torch.zeros_like(C)}) == NO_TRUTH
    assert changed(target, {"dt_min": 1e308, "C": torch.zeros_like(C)}) == REFUSED


def test_what_the_oracle_errs_by_counts_where_nothing_is_claimed() -> None:
    """Steps of 2^62: of the numbers in one product some are too large for a claim, others are their differences."""
    target, ends = first("mamba_chunk_scan_forward_states"), collections.Counter[str]()

    def shrunk(**arguments: Any) -> Any:
        return tuple(t * (1 - 1e-4) for t in target.call(**arguments))

    for number, base in enumerate(target.bases[::2]):
        change = {"dt_min": 2.0**62, "x": base()["x"].float()}
        ends[changed(target, change, 2 * number)] += 1
        try:
            changed(target._replace(call=shrunk), change, 2 * number)
        except Wrong:
            ends["found"] += 1
    assert ends.keys() == {RIGHT, REFUSED, "found"}  # some are refused, as dt_max is less
    assert ends["found"] > 0.9 * ends[RIGHT]


@pytest.mark.parametrize("target", [t for t in all_targets("torch") if t.written and not t.has_oracle], ids=named)
def test_an_input_in_memory_that_is_written_is_read_before_that(target: Target) -> None:
    """Or the call is refused, with nothing written."""
    tried = 0
    for written in sorted(target.written):
        for name, value in target.bases[0]().items():
            arguments = target.bases[0]()
            if not isinstance(value, Tensor) or name == written or arguments.get(written) is None:
                continue
            if value.dtype == arguments[written].dtype:
                change = {name: in_memory_of(arguments[written], value)}
                assert changed(target, {written: arguments[written], **change}) in (RIGHT, REFUSED, NO_TRUTH)
                tried += 1
    assert tried or target.name in ("causal_conv1d_fn", "chunk_gated_delta_rule")  # what is written may be left out


def test_nothing_is_claimed_of_tokens_outside_all_rows() -> None:
    """Without an output of the caller's, what an op returns there is memory as it was."""
    ends = []
    for target in all_targets("torch"):
        bases = [(number, base()) for number, base in enumerate(target.bases)]
        if not target.has_oracle or target.records or "out" not in target.written or "counts" in bases[0][1]:
            continue
        packed = [(i, a["cu_seqlens"]) for i, a in bases if a.get("cu_seqlens") is not None]
        for number, cu_seqlens in packed[:1]:
            ends.append(changed(target, {"cu_seqlens": cu_seqlens.clamp(max=1), "out": None}, number))
    assert ends.count(RIGHT) > 3


@pytest.mark.parametrize("target", [t for t in all_targets("torch") if not t.has_oracle and not t.records], ids=named)
def test_a_size_of_zero_is_taken_or_refused(target: Target) -> None:
    for name, value in target.bases[0]().items():
        for dim in range(value.dim() if isinstance(value, Tensor) else 0):
            assert changed(target, {name: value.narrow(dim, 0, 0).clone()}) in (RIGHT, REFUSED, NO_TRUTH)


@pytest.mark.parametrize("target", [t for t in all_targets("torch") if not t.has_oracle and not t.records], ids=named)
def test_a_tensor_of_another_layout_is_refused_if_it_is_read(target: Target) -> None:
    for name, value in target.bases[0]().items():
        if isinstance(value, Tensor):
            others = [value.to_sparse(), *([value.to_mkldnn()] if value.is_floating_point() and value.dim() else [])]
            assert {changed(target, {name: other}) for other in others} <= {REFUSED, NO_TRUTH, RIGHT}


@pytest.mark.parametrize("name", ["cu_seqlens_cpu", "g"])
def test_a_tangent_may_end_in_an_argument_of_no_effect_alone(name: str) -> None:
    named = [t for t in all_targets("torch") if t.name == "chunk_gated_delta_rule" and not t.records]
    target = next(t for t in named if "cu_seqlens_cpu" in t.bases[0]())  # of fla
    arguments = target.bases[0]() | {"cu_seqlens_cpu": torch.ones(2, 6, 2)}

    def without_tangents(**given: Any) -> Any:
        return target.call(**{n: unpack_dual(a).primal if isinstance(a, Tensor) else a for n, a in given.items()})

    with torch.no_grad(), contextlib.nullcontext() if name == "cu_seqlens_cpu" else pytest.raises(Wrong, match="lost"):
        TRANSFORMS["forward-mode AD"](without_tangents, name, **arguments)


def test_angles_are_summed_in_small_steps() -> None:
    """A sum of angles that are less than a step is 0, where the truth is less than a step."""
    target = first("mamba3_chunk_scan")
    for number, base in enumerate(target.bases):
        if (goes_on := base()["has_initial_state"]) is not None:
            assert changed(target, {"has_initial_state": torch.zeros_like(goes_on)}, number) in (RIGHT, NO_TRUTH)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="calls of the fuzzer are on CPU tensors")
def test_what_a_row_of_narrow_numbers_is_rounded_by_counts_in_layers_on_other_backends() -> None:
    """Its scale is its largest number's: a layer errs by half a step of that once, and by two steps nowhere."""
    narrow = [t for t in all_targets("triton") if "state_scale" in t.bases[0]() and t.name == "Mamba2"]
    assert narrow
    for target in narrow:
        assert changed(target, {}) == RIGHT

        def off(target: Target = target, **arguments: Any) -> Any:
            result = target.call(**arguments)
            state = arguments["ssm_state"]
            state.copy_((state.int() + 3).clamp(-32767, 32767))
            return result

        with pytest.raises(Wrong, match=r"ssm_state: .* outside the budget"):
            changed(target._replace(call=off), {})


@pytest.mark.parametrize("name", ["Mamba2", "KimiDeltaAttention"])
def test_a_layer_with_narrow_states_is_called_as_it_is_whatever_its_truth_was_computed_in(name: str) -> None:
    narrow = [t for t in all_targets("torch") if t.name == name and "state_scale" in t.bases[0]()]
    assert narrow
    for target in narrow:
        for dtype in (torch.float32, torch.float64):
            target.truth(target.bases[0](), dtype)
            assert target.bases[0]()["conv_state"].dtype == torch.float32


def test_roundings_that_a_kernel_may_leave_out_count_as_those_that_it_makes() -> None:
    """Here the reference, which rounds what is convolved alone, errs thrice as much as what rounds in chunks, too."""
    target = first("kda_mixing")
    for number, base in enumerate(target.bases):
        if base()["write_slots"] is not None:
            assert changed(target, {"b": -base()["b"]}, number) in (RIGHT, NO_TRUTH)


def test_what_an_angle_is_off_by_counts_in_all_that_it_turns() -> None:
    """By two steps of float32 k and the state may be turned more, by many not."""
    target, ends = first("mamba3_state_update"), []
    for steps in (2, 16):

        def turned(angle_state: Tensor, steps: int = steps, **arguments: Any) -> Any:
            return target.call(angle_state=angle_state + steps * 2.0**-22, **arguments)

        try:
            ends.append(changed(target._replace(call=turned, written=target.written - {"angle_state"}), {}, 1))
        except Wrong as error:
            ends.append(str(error).split(":")[0])
    assert ends == [RIGHT, "ssm_state"]


# -- what it finds ----------------------------------------------------------------------------------------------------


def found(target: Target, calls: int = 150) -> list[str]:
    """What random calls of one target end in that none may."""
    wrong = []
    for seed in range(calls):
        try:
            call_of(target, random.Random(seed).randrange)
        except Wrong as error:
            wrong.append(str(error))
    return wrong


def first(name: str) -> Target:
    return next(target for target in all_targets("torch") if target.name == name)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Decisions that were made with the real checks and kernels are forgotten, before and after."""
    dispatcher.changed()
    yield
    dispatcher.changed()


CONV = mamba_ops.causal_conv1d_update
BACKWARD = mamba_ops.causal_conv1d.backward_op


def wrapped(op: Op[...], patch: pytest.MonkeyPatch, change: Any) -> None:
    """Plant a fault in an op's reference."""
    kernel = op.kernels["torch"]
    real = kernel.function

    def run(*args: Any, **kwargs: Any) -> None:
        change(real, dict(zip([p.name for p in op.parameters], args, strict=False)) | kwargs)

    patch.setitem(kernel.__dict__, "function", run)
    dispatcher.changed()


def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    assert found(first(CONV.name)) == []

    def bias_twice(real: Any, call: dict[str, Any]) -> None:
        real(**call)
        if call["bias"] is not None:
            call["output"] += call["bias"].to(call["output"].dtype).view(-1, *[1] * (call["x"].dim() - 2))[:1] * 0.5

    wrapped(CONV, monkeypatch, bias_twice)
    assert any("outside the budget" in said for said in found(first(CONV.name)))


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    assert found(first(BACKWARD.name)) == []

    def shrunk(real: Any, call: dict[str, Any]) -> None:
        real(**call)
        call["grad_weight"] *= 0.9

    wrapped(BACKWARD, monkeypatch, shrunk)
    for target in (
        first(BACKWARD.name),
        next(t for t in all_targets("torch") if t.name == "causal_conv1d" and t.judge),
    ):
        assert any("outside the budget" in said for said in found(target, 40))


def test_an_error_after_a_write_is_found(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Values are looked at too late."""
    checks = CONV.facets.pop("validate_values")
    dispatcher.changed()
    try:

        def late(real: Any, call: dict[str, Any]) -> None:
            call["conv_state"][:1, :1, :1] += 1  # which may have any strides
            checks(**call)
            call["conv_state"][:1, :1, :1] -= 1
            real(**call)

        wrapped(CONV, monkeypatch, late)
        assert any("and wrote to conv_state" in said for said in found(first(CONV.name), 400))
    finally:
        CONV.facets["validate_values"] = checks


def test_a_cryptic_error_is_found(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Shapes are not looked at."""
    monkeypatch.setitem(CONV.facets, "validate", lambda *args, **kwargs: None)
    dispatcher.changed()
    said = found(first(CONV.name))
    assert any(re.search("expected a ValueError or a TypeError|it does not say|it names no argument", s) for s in said)


def test_a_right_call_that_is_refused_is_found(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    def no(*args: Any, **kwargs: Any) -> None:
        raise registry.bad_argument("x", got="one", expected="another")

    monkeypatch.setitem(CONV.facets, "validate", no)
    dispatcher.changed()
    assert any("a right call ended in ValueError" in said for said in found(first(CONV.name)))


def test_a_call_that_compares_nothing_is_found() -> None:
    target = first(CONV.name)
    arguments = target.bases[0]()
    types = {n: type(a) for n, a in arguments.items()}
    with torch.no_grad(), pytest.raises(Wrong, match="nothing of which the truth is known"):
        outcome(target._replace(truth=lambda *_: {}), arguments, types)


def test_faults_of_pools_and_prefix_caches_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the state before the accepted token, and a state of a step that failed."""
    copied = StatePool.copy

    def run_many(kind: Any, calls: int = 300) -> None:
        for seed in range(calls):
            kind(random.Random(seed).randrange)

    for kind, changed, name, fault in (
        (plans.copy, StatePool, "copy", lambda self, source, target, *, accepted: copied(self, source, target)),
        (plans.prefixes, PrefixCache, "discard", PrefixCache.commit),
    ):
        run_many(kind)
        monkeypatch.setattr(changed, name, fault)
        with pytest.raises(Wrong):
            run_many(kind)
