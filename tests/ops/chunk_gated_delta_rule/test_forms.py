"""The two forms of each kernel, of which a device runs one: the walk's has values as rows, or tokens."""

import pytest

pytest.importorskip("triton")

from mamba_ops.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from tests.forms import judge_form


@pytest.mark.parametrize("joined", [False, True], ids=["values as rows", "tokens as rows"])
def test_every_form(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    judge_form(chunk_gated_delta_rule, {"_solve": {"SQUARES": joined}, "_scan": {"JOINED": joined}}, monkeypatch)
