"""A whole layer's mixing with its decodes on a stand-in for FlashInfer (see stand_in.py)."""

import pytest

from mamba_ops import mamba2_mixing, use_backend
from mamba_ops.registry import NoBackendError
from mamba_ops.testing.judge import front_on
from tests.harness import judge
from tests.on_flashinfer.calls import Calls

SAMPLES = {sample.name: sample for sample in mamba2_mixing.make_samples("cpu", head_dim=128, dstate=64)}


@pytest.mark.parametrize(("name", "steps"), [("base", 1), ("prefills", 0), ("padding rows", 1), ("speculative", 1)])
def test_decodes_run_on_it(calls: Calls, name: str, steps: int) -> None:
    """Also where a token of the projection, of which x, B and C are parts, starts at no multiple of 16 bytes."""
    judge(mamba2_mixing, SAMPLES[name], front_on(mamba2_mixing, "flashinfer"))
    assert len(calls) == steps


def test_what_it_refuses_is_refused_before_the_convolution(calls: Calls) -> None:
    call = SAMPLES["decodes"].clone()
    with use_backend("flashinfer"), pytest.raises(NoBackendError, match="takes out in x's bfloat16, and it is float32"):
        mamba2_mixing(*call.args, **call.kwargs)
    arguments, before = (mamba2_mixing.bind(s.args, s.kwargs) for s in (call, SAMPLES["decodes"]))
    assert all(arguments[name].equal(before[name]) for name in ("conv_state", "ssm_state"))
    assert calls == []
