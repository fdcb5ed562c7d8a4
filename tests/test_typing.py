"""What a type checker sees of an op: mypy --strict over a user's file, with the errors that it must find."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is in the dev extra")

USER = """\
import torch
from torch import Tensor

import mamba_ops
from mamba_ops.registry import Namespace, require_out

x, cache, weight = torch.zeros(2, 8), torch.zeros(2, 8, 3), torch.zeros(8, 4)
reveal_type(mamba_ops.causal_conv1d_update(x, cache, weight, silu=False))  # reveals "torch._tensor.Tensor"
out: Tensor | None = None
mamba_ops.causal_conv1d_update(x, cache, weight, None, slots=None, out=out)
mamba_ops.causal_conv1d_update(x, cache)  # error: call-arg
mamba_ops.causal_conv1d_updates(x, cache, weight)  # error: attr-defined
mamba_ops.causal_conv1d_update(x, cache, weight, output=x)  # error: call-arg
mamba_ops.causal_conv1d_update(x, cache, "weight")  # error: arg-type
mamba_ops.selective_state_update(cache, x, x, x, x, x, dt_softplus=1.5)  # error: arg-type

mine = Namespace("mine")


@mine.op(mutates=("out",))
def scaled(x: Tensor, factor: float = 2.0, *, out: Tensor | None = None) -> Tensor:
    return torch.mul(x, factor, out=require_out(out))


reveal_type(scaled(x, 3.0, out=x))  # reveals "torch._tensor.Tensor"
scaled(x, "3")  # error: arg-type
scaled(x, factors=3.0)  # error: call-arg


@mine.op(mutates=("output",))
def plain(x: Tensor, *, output: Tensor) -> None:
    output.copy_(x)


plain(x)
"""


def test_the_signature_survives(tmp_path: Path) -> None:
    user = tmp_path / "user.py"
    user.write_text(USER)
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--follow-imports=silent", str(user)],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    found: dict[int, str] = {}
    for line, kind, text in re.findall(r"user\.py:(\d+): (error|note): (.*)", run.stdout):
        code = re.search(r"\[([a-z-]+)\]$", text)
        revealed = re.search(r'Revealed type is "(.*)"', text)
        if kind == "error" and code:
            found[int(line)] = f"error: {code[1]}"
        elif revealed:
            found[int(line)] = f'reveals "{revealed[1]}"'
    expected = {number: line.split("  # ")[1] for number, line in enumerate(USER.splitlines(), 1) if "  # " in line}
    assert found == expected, run.stdout + run.stderr
