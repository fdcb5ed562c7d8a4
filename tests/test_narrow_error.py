"""The error of narrow states over many steps, beside a stand-in for FlashInfer's, as the benchmark has it."""

import pytest
import torch

from benchmarks.narrow_states import FORMATS, OPS, errors, missed_goals

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, 48) for name in OPS] + [pytest.param(name, 4096, marks=pytest.mark.slow) for name in OPS],
)
def test_at_most_twice_the_stand_in(name: str, steps: int) -> None:
    rows = errors(name, steps, CPU, sizes=(1, 4, 4, 128))
    assert not missed_goals(name, rows)
    ends = {label: row["state"][-1] for label, row in rows.items()}
    assert list(ends) == list(FORMATS)
    assert (
        ends["float32"] < ends["int16"] < ends["int16 stochastic"] < ends["float16"] < ends["bfloat16"] < ends["float8"]
    )
    assert rows["float8"]["bytes"] <= 0.55 * rows["bfloat16"]["bytes"]


def test_missed_goals_are_told() -> None:
    keys = ("state", "output", "stand-in's state", "stand-in's output")
    row = dict(zip(keys, ([0.5], [0.1], [0.2], [0.1]), strict=True))
    rows = {"bfloat16": {**row, "state": [0.3], "bytes": 10}, "float8 stochastic": {**row, "bytes": 6}}
    said = missed_goals("op", rows)
    assert said[0] == "op, float8 stochastic: error of states 5.0e-01, expected at most twice 2.0e-01"
    assert said[1].startswith("op, float8 stochastic: 6 bytes, expected at most 0.55")
    assert len(said) == 2
