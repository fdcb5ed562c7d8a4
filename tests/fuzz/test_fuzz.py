"""Random calls: a few every day, more in `make test-all`, as many as one likes with `python -m tests.fuzz`."""

import collections
import re
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import mamba_ops
from tests.fuzz.calls import one_call
from tests.fuzz.mutations import Pick
from tests.fuzz.outcomes import NO_TRUTH, REFUSED, RIGHT, Wrong, outcome
from tests.fuzz.targets import targets


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


def test_what_the_fuzzer_looks_for_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong number, a cryptic error, and an error after something was written."""
    [target] = [t for t in targets() if t.name == "causal_conv1d_update"][:1]
    types = {n: type(a) for n, a in target.bases[0]().items()}
    assert outcome(target, target.bases[0](), types) == RIGHT

    def call_with(after: Any) -> str:
        def call(**arguments: Any) -> Any:
            with torch.no_grad():
                result = mamba_ops.causal_conv1d_update(**arguments)
            return after(result)

        with pytest.raises(Wrong) as found:
            outcome(target._replace(call=call), target.bases[0](), types)
        return str(found.value)

    def late(_: Any) -> Any:
        raise ValueError("mamba_ops::causal_conv1d_update: x: got one, expected another")

    assert re.search("outside the budget", call_with(lambda result: result * 1.01))
    assert re.search("and wrote to conv_state", call_with(late))
    monkeypatch.setattr("mamba_ops.causal_conv1d_update", lambda **_: {}["x"])
    assert re.search("expected a ValueError or a TypeError", call_with(None))
