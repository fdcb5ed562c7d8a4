"""Backends on a toy op: priority, refusals, missing packages."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import registry
from mamba_ops.registry import (
    DeclarationError,
    Namespace,
    NoBackendError,
    Op,
    explain,
    require_out,
    use_backend,
)
from tests.registry.toys import adapter, call


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda total, x, *, bias=None, output: None, r"expected scale=1.0"),
        (lambda total, y, *, bias=None, scale=1.0, output: None, r"got parameter y .*, expected x"),
        (lambda total, x, *, bias=None, scale=2.0, output: None, r"got parameter scale=2.0 .*, expected scale=1.0"),
        (lambda total, x, bias=None, *, scale=1.0, output: None, r"expected bias=None \(keyword-only\)"),
        (lambda total, x, *, bias=None, scale=1.0, output, more=0: None, "got 6 parameters, expected 5"),
    ],
)
def test_adapters_have_the_ops_signature(add: Op[...], backend: Any, wrong: Any, says: str) -> None:
    with pytest.raises(DeclarationError, match=says):
        backend("wrong").implements(add)(wrong)


def _grown(toys: Namespace, added: Sequence[str] = ("twice",)) -> Op[...]:
    @toys.op(mutates=("out",), added=added)
    def grown(x: Tensor, *, scale: float = 1.0, twice: bool = False, out: Tensor | None = None) -> Tensor:
        """Write x, scaled."""
        return require_out(out).copy_(x * scale * (2 if twice else 1))

    @grown.allocate_output
    def _output(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    return grown


@pytest.mark.parametrize("by_path", [False, True])
def test_a_kernel_may_lack_a_keyword_that_the_op_gained(toys: Namespace, backend: Any, by_path: bool) -> None:
    grown = _grown(toys)
    old = backend("old", priority=1)
    old.implements(grown, f"{__name__}:nines" if by_path else nines)
    x = torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(grown(x), x * 9)
        assert torch.equal(torch.compile(lambda x: grown(x), backend="aot_eager", fullgraph=True)(x), x * 9)
    with pytest.warns(RuntimeWarning, match="runs on torch because old does not take the call: does not know twice"):
        assert torch.equal(grown(x, twice=True), x * 2)
    with use_backend("old"):
        assert torch.equal(grown(x, twice=False), x * 9)
        with pytest.raises(NoBackendError, match="old  does not know twice"):
            grown(x, twice=True)


def nines(x: Tensor, *, scale: float = 1.0, output: Tensor) -> None:
    """A kernel of before the op had `twice`."""
    output.fill_(9)


def test_a_kernel_lacks_nothing_else(toys: Namespace, backend: Any) -> None:
    grown = _grown(toys)
    with pytest.raises(DeclarationError, match=r"expected scale=1\.0"):
        backend("wrong").implements(grown)(lambda x, *, output: None)
    with pytest.raises(DeclarationError, match=r"got parameter twice=True .*, expected twice=False"):
        backend("other").implements(grown)(lambda x, *, scale=1.0, twice=True, output: None)


def test_what_an_op_gained_has_a_default(toys: Namespace) -> None:
    with pytest.raises(DeclarationError, match="added names twoce, x, expected keywords with defaults"):
        _grown(toys, ["x", "twoce"])


def test_priority_decides(add: Op[...], backend: Any) -> None:
    assert call(add) == 1.0
    backend("low", priority=-1).implements(add)(adapter(7))
    assert call(add) == 1.0
    backend("high", priority=1).implements(add)(adapter(8))
    assert call(add) == 8.0
    with use_backend("low"):
        assert call(add) == 7.0
        with use_backend(add="torch"):
            assert call(add) == 1.0
        assert call(add) == 7.0
    assert call(add) == 8.0


def test_a_named_backend_never_falls_back(add: Op[...], backend: Any) -> None:
    why = backend("picky", priority=1)
    why.implements(add, unsupported=lambda x: f"takes float32, got {x.dtype}" if x.dtype != torch.float32 else None)(
        adapter(9)
    )
    total, x = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    with use_backend("picky"), pytest.raises(NoBackendError) as error:
        add(total, x)
    assert str(error.value).splitlines() == [
        "toys::add: the backend asked for refuses this call",
        "  picky  takes float32, got torch.float64",
        "(asked for by use_backend; a backend asked for by name never falls back)",
    ]
    assert not total.any()
    with pytest.warns(
        RuntimeWarning, match=r"toys::add runs on torch because picky does not take the call: takes float32"
    ):
        add(total, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))  # said once


def test_no_backend_lists_every_reason(add: Op[...], backend: Any) -> None:
    del add.kernels["torch"]
    backend("elsewhere", devices=["cuda"]).implements(add)(adapter(1))
    backend("picky", priority=2).implements(add, unsupported=lambda bias: None if bias is None else "takes no bias")(
        adapter(2)
    )
    with pytest.raises(NoBackendError) as error:
        call(add, bias=torch.ones(3))
    assert str(error.value).splitlines() == [
        "toys::add: no backend accepts this call",
        "  picky      takes no bias",
        "  elsewhere  runs on cuda, not on cpu",
    ]
    assert error.value.reasons == {"picky": "takes no bias", "elsewhere": "runs on cuda, not on cpu"}


def test_per_call_refusals_are_asked_every_time(add: Op[...], backend: Any) -> None:
    dense = backend("dense", priority=1)
    why = lambda x: None if x.is_contiguous() else "x is not contiguous"  # noqa: E731
    dense.implements(add, unsupported_layout=why)(adapter(5))
    straight, strided = torch.ones(3, 2), torch.ones(2, 3).t()
    assert add(torch.zeros(3, 2), straight)[0, 0] == 5
    with pytest.warns(RuntimeWarning, match="x is not contiguous"):
        assert add(torch.zeros(3, 2), strided)[0, 0] == 1
    assert add(torch.zeros(3, 2), straight)[0, 0] == 5
    with use_backend("dense"), pytest.raises(NoBackendError, match="dense  x is not contiguous"):
        add(torch.zeros(3, 2), strided)


def test_missing_and_broken_packages(
    add: Op[...], backend: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend("absent", requires="no_such_package", install="mamba-ops[absent]", priority=3).implements(add)(adapter(1))
    says = r"no_such_package is not installed; pip install 'mamba-ops\[absent\]'"
    with pytest.warns(RuntimeWarning, match=says):
        assert call(add) == 1.0
    with use_backend("absent"), pytest.raises(NoBackendError, match=says):
        call(add)
    (tmp_path / "broken_package.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    broken = backend("broken", requires="broken_package")
    broken.implements(add)(adapter(1))
    says = "broken_package is installed but cannot be imported: ModuleNotFoundError: No module named 'no_such_dep"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match=says):
            explain(add, torch.zeros(1), torch.ones(1))
        assert says in str(explain(add, torch.zeros(1), torch.ones(1)))  # it is said once


def test_devices_by_name(add: Op[...], backend: Any) -> None:
    backend("interpreted", devices=["cuda"], devices_by_name=lambda: ["cpu"], priority=9).implements(add)(adapter(6))
    assert call(add) == 1.0
    with use_backend("Interpreted"):
        assert call(add) == 6.0


def test_removed_backends_are_forgotten(add: Op[...], backend: Any) -> None:
    gone = backend("gone", priority=1)
    gone.implements(add)(adapter(4))
    assert call(add) == 4.0
    gone.remove()
    assert call(add) == 1.0
    assert "gone" not in [b.name for b in registry.backends()]
