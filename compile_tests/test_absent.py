"""Both ops traced for devices that are not there: one graph each, with the ops in it."""

import pytest

from compile_tests.absent_targets import recording
from mamba_ops.audit import absent
from tests.conftest import ABSENT
from tests.layers import KINDS


@pytest.mark.parametrize("device", ABSENT)
def test_every_op_is_one_graph(device: str) -> None:
    traces = absent.run("compile_tests.absent_targets:step_of_each_op", device=device)
    assert len(traces) >= 10
    for name, trace in traces.items():
        assert trace["out"] == [device, True]
        assert not trace["breaks"]
        assert not trace["recompiles"]
        [graph] = trace["graphs"]
        assert f"mamba_ops.{name}.default" in graph["ops"]
        assert any(f"mamba_ops.{name}.default" in op for op in graph["aot_ops"])


@pytest.mark.slow
@pytest.mark.parametrize("device", ABSENT)
def test_a_training_step_of_each_layer_is_one_graph(device: str) -> None:
    """The forward is, with the ops that record gradients, and every backward op can be traced on the device.

    What joins them is autograd's engine, in C++: it asks for the streams of an accelerator, and there is none. When it
    asks no more, this fails, and both directions can be traced.
    """
    found = absent.run("compile_tests.absent_targets:training_step_of_each_layer", device=device)
    assert set(found) == set(KINDS)
    for name, trace in found.items():
        [graph] = trace["graphs"]
        ops = recording(KINDS[name].prefill)
        assert graph == [f"mamba_ops.{op}_forward.default" for op in ops]
        assert trace["recorded"]
        assert trace["backwards"] == {f"{op}_backward": True for op in ops}
        assert "Cannot access accelerator device when none is available" in trace["reason"]


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
