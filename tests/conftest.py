"""What every test stands on: one thread, NaN in fresh memory, and Triton interpreted where there is no GPU."""

import contextlib
import gc
import importlib.util
import logging
import os
import sys
from typing import Any

# Before torch reads them: the tests run one process per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # where a test has two threads
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it

import pytest
import torch

from tests import daily, shares

ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
if ACCELERATOR is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it once, at import

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests import interpreter

    interpreter.hasten()

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN: what nobody wrote shows
# It keeps what torch's own operators give on fake tensors, never what ours do. Where sizes are symbols that takes a
# quarter of a trace's time and finds nothing.
torch._dynamo.config.fake_tensor_cache_enabled = False


def _keep_pytest_from(logger: logging.Logger) -> None:
    """From pytest 9.2 on it listens to loggers that do not propagate. With a listener torch writes its trace down, as
    JSON, for each compilation: a tenth of its time.
    """
    add = logger.addHandler
    logger.addHandler = lambda h: None if type(h).__module__.startswith("_pytest") else add(h)  # type: ignore[method-assign]


_keep_pytest_from(logging.getLogger("torch.__trace"))

_ABSENT = [name for name in ("xpu", "cuda") if not torch.get_device_module(name).is_available()]
ABSENT = [pytest.param(name, marks=pytest.mark.slow if number else ()) for number, name in enumerate(_ABSENT)]
"""Devices that are not here, to trace on. Traces are alike on all of them: one is enough for every day."""

with contextlib.suppress(ImportError):  # a bare GPU machine has none
    import hypothesis

    # No deadline, an interpreted kernel is slow; no database and no randomness, a red test stays red.
    hypothesis.settings.register_profile("mamba_ops", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("mamba_ops")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    daily.mark(items)
    if hasattr(config, "workerinput"):
        shares.sort(items)
    whole = ACCELERATOR is None and all(map(importlib.util.find_spec, ("triton", "transformers")))
    if whole and (empty := [item.nodeid for item in items if has_no_cases(item)]):
        raise pytest.UsageError(f"tests of no cases, which would pass: {', '.join(empty)}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return shares.scheduler(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection() -> None:
    """Make 12,000 tests without a look for garbage, which takes longer than they do."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Look for garbage less often: else that is a tenth of the tests' time."""
    gc.set_threshold(50_000, 10, 10)
    gc.enable()


def has_no_cases(item: pytest.Item) -> bool:
    """Whether an item stands for a test whose parametrisation is empty."""
    reasons = (str(mark.kwargs.get("reason", "")) for mark in item.iter_markers("skip"))
    return any("got empty parameter set" in reason for reason in reasons)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if ACCELERATOR is None and item.get_closest_marker("gpu"):
        pytest.skip("needs an accelerator")
    torch.manual_seed(0)  # so that a test draws the same numbers alone and in company


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The accelerator of this machine, or its CPU."""
    return ACCELERATOR or torch.device("cpu")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def fresh_dynamo():
    """Forget all compiled code before and after the test; for tests that count graphs or recompiles."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def forget_captures():
    """A graph that a test captured is gone after it; a swap in the next one must not warn of it."""
    yield
    if "mamba_ops" in sys.modules:
        sys.modules["mamba_ops"].registry.dispatcher.dispatcher.captured.clear()
