"""The two forms of the walk over chunks, of which a device runs one: with values as rows, and with tokens as rows."""

import pytest

pytest.importorskip("triton")

from mamba_ops.ops.chunk_kda import chunk_kda
from tests.forms import judge_form


@pytest.mark.parametrize("joined", [False, True], ids=["values as rows", "tokens as rows"])
def test_every_form(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    judge_form(chunk_kda, {"_scan": {"JOINED": joined}}, monkeypatch)
