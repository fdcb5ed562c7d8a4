"""Both ops traced for devices that are not there: one graph each, with the ops in it."""

import pytest

from mamba_ops.audit import absent
from tests.conftest import ABSENT


@pytest.mark.parametrize("device", ABSENT)
def test_every_op_is_one_graph(device: str) -> None:
    for name, trace in absent.run("compile_tests.absent_targets:step_of_each_op", device=device).items():
        assert trace["out"] == [device, True]
        assert not trace["breaks"]
        assert not trace["recompiles"]
        [graph] = trace["graphs"]
        assert f"mamba_ops.{name}.default" in graph["ops"]
        assert any(f"mamba_ops.{name}.default" in op for op in graph["aot_ops"])


@pytest.mark.parametrize("device", ABSENT)
def test_a_module_of_both_ops_is_one_graph(device: str) -> None:
    trace = absent.run("compile_tests.absent_targets:module", device=device)
    assert not trace["breaks"]
    assert not trace["recompiles"]
    [graph] = trace["graphs"]
    assert [op for op in graph["ops"] if "mamba_ops" in op] == [
        "mamba_ops.causal_conv1d_update.default",
        "mamba_ops.selective_state_update.default",
    ]
