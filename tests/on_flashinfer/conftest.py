"""The backend let loose on CPU tensors, with the stand-in in the vendor's place, or with its import not yet tried."""

from collections.abc import Callable, Iterator
from importlib import import_module

import pytest

from mamba_ops.registry.dispatcher import dispatcher
from tests.on_flashinfer import stand_in
from tests.on_flashinfer.calls import Calls

mamba = import_module("mamba_ops.ops.selective_state_update.flashinfer")
vendor = import_module("mamba_ops.backends.flashinfer")
flashinfer = vendor.flashinfer


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
    mamba._kernel.cache_clear()  # it is bound once
    dispatcher.changed()
    with stand_in.installed() as seen:
        yield seen
    mamba._kernel.cache_clear()
    dispatcher.changed()


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend let loose on CPU tensors, its import not yet tried."""
    monkeypatch.setattr(flashinfer, "devices", ("cpu",))
    monkeypatch.setattr(flashinfer, "_import_problem", flashinfer._try_import)
