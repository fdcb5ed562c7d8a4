"""Which kernel runs: by name, by environment, under threads; and what is said about it."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import registry
from mamba_ops.registry import Namespace, Op, RegistryError, UnknownNameError, explain, record_selections, use_backend
from mamba_ops.registry.snapshot import Request
from tests.harness import environment
from tests.registry.toys import adapter, call


def test_unknown_names_are_answered_with_the_valid_ones(add: Op[...], backend: Any) -> None:
    with (
        pytest.raises(UnknownNameError, match=r"unknown backend 'tirton'; valid: .*torch, triton"),
        use_backend("tirton"),
    ):
        pass
    with pytest.raises(UnknownNameError, match="unknown op 'ad'; valid: add, "), use_backend(ad="torch"):
        pass
    backend("idle")
    with (
        pytest.raises(RegistryError, match="'idle' has no kernel for toys::add; it can run on: torch"),
        use_backend(add="idle"),
    ):
        pass
    with pytest.raises(UnknownNameError, match="unknown op 'ad'"):
        explain("ad")


def test_a_bare_name_binds_only_ops_with_a_kernel(add: Op[...], backend: Any) -> None:
    backend("idle")
    with use_backend("idle"):
        assert call(add) == 1.0
        assert explain(add, torch.zeros(1), torch.ones(1)).bound_by is None


@pytest.mark.parametrize("value", ["marked", "MARKED", "add=marked", " add = Marked , torch"])
def test_environment(toys: Namespace, add: Op[...], backend: Any, value: str) -> None:
    backend("marked", priority=-1).implements(add)(adapter(3))
    with environment(TOYS_BACKEND=value):
        assert call(add) == 3.0
        assert explain(add, torch.zeros(1), torch.ones(1)).bound_by == "TOYS_BACKEND"
        with use_backend("torch"):
            assert call(add) == 1.0


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("nobody", "TOYS_BACKEND: unknown backend 'nobody'; valid: "),
        ("subtract=torch", "TOYS_BACKEND: unknown op or setting 'subtract'; valid: add"),
        ("torch,triton", "TOYS_BACKEND: got the bare names torch, triton, expected at most one"),
    ],
)
def test_bad_environment(toys: Namespace, add: Op[...], value: str, says: str) -> None:
    total = torch.zeros(3)
    with environment(TOYS_BACKEND=value), pytest.raises(RegistryError, match=says):
        add(total, torch.ones(3))
    assert not total.any()


def test_generation_counts_changes(add: Op[...], backend: Any) -> None:
    start = registry.generation()
    call(add)
    assert registry.generation() == start
    with use_backend("torch"):
        assert registry.generation() != start
    assert registry.generation() == start  # what was selected before is selected again
    with record_selections():
        assert registry.generation() == start  # listening changes no kernel
    backend("better")
    assert registry.generation() > start


def test_explain_says_who_and_why_not(add: Op[...], backend: Any) -> None:
    backend("far", devices=["cuda"], priority=5).implements(add)(adapter(1))
    found = explain("add", torch.zeros(1), torch.ones(1))
    assert (found.op, found.backend, found.bound_by) == ("toys::add", "torch", None)
    assert found.reasons == {"far": "runs on cuda, not on cpu"}
    assert str(found).splitlines() == [
        "toys::add",
        "  torch  runs (default order)",
        "  far    runs on cuda, not on cpu",
    ]
    with use_backend("far"):
        found = explain(add, torch.zeros(1), torch.ones(1))
    assert (found.backend, found.bound_by) == (None, None)
    with pytest.raises(ValueError, match=r"toys::add: x: got shape \(2,\), expected \(1,\)"):
        explain(add, torch.zeros(1), torch.ones(2))


def test_record_selections(add: Op[...], backend: Any) -> None:
    backend("other", priority=-1).implements(add)(adapter(1))
    call(add)
    with record_selections() as outer:
        call(add)
        with record_selections() as inner, use_backend("other"):
            call(add)
    call(add)
    assert inner == [("toys::add", "other")]
    assert outer == [("toys::add", "torch"), ("toys::add", "other")]


def test_two_threads_swap_and_leave_in_any_order(add: Op[...], backend: Any) -> None:
    """Swapping is process-wide; a thread that leaves takes back its own request and nobody else's."""
    for name in ("one", "two"):
        backend(name, priority=-1).implements(add)(adapter(1.5))
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with use_backend("one"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    with use_backend("two"):
        leave.set()
        thread.join()
        assert explain(add, torch.zeros(1), torch.ones(1)).backend == "two"
    assert explain(add, torch.zeros(1), torch.ones(1)).backend == "torch"


def test_a_decision_under_way_does_not_outlive_a_swap(add: Op[...], backend: Any) -> None:
    """A thread that decides while another swaps must not leave its decision behind."""
    other = backend("other", priority=-1)
    other.implements(add)(adapter(2))
    started, swapped = threading.Event(), threading.Event()

    def slow(x: Tensor) -> None:
        if threading.current_thread() is thread:
            started.set()
            swapped.wait(10)

    slow_backend = backend("slow", priority=1)
    slow_backend.implements(add, unsupported=slow)(adapter(1))
    thread = threading.Thread(target=call, args=[add])
    thread.start()
    assert started.wait(10)
    with use_backend("other"):
        swapped.set()
        thread.join()
        assert call(add) == 2.0


class Settings:
    """What a configuration is to the registry."""

    def __init__(self, **settings: str) -> None:
        self.settings = settings

    def request(self, by: str) -> Request:
        return Request(by, settings=tuple(self.settings.items()))


def test_backends_have_their_settings_before_they_are_asked(add: Op[...], backend: Any) -> None:
    fast = backend("fast", priority=1, settings={"gear": ("low", "high")})
    seen = []
    fast.implements(add, unsupported=lambda x: seen.append(fast.settings["gear"]))(adapter(1))
    call(add)
    with use_backend(Settings(fast_gear="high", slow_gear="none")):
        call(add)
        with use_backend("fast"):  # names state no settings
            call(add)
        with use_backend(Settings()):  # whoever states one states all
            call(add)
    call(add)  # decided before
    assert seen == ["low", "high", "high", "low"]
    assert fast.choices == {"gear": ("low", "high")}
