"""Training steps under torch.compile's default backend, also beside programs that are decomposed."""

import os
from pathlib import Path

from tests import fresh

STEPS = """
import torch
from mamba_ops import export
from mamba_ops.layers import ShortConv
torch.manual_seed(0)
for order in ("before", "after"):
    layer = ShortConv(16)
    loss = torch.compile(layer, fullgraph=True)(torch.randn(2, 20, 16)).square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters()), order
    with torch.enable_grad():
        program = torch.export.export(layer, (torch.randn(2, 20, 16),))
    called = {str(n.target) for n in program.run_decompositions(export.decompositions()).graph.nodes}
    assert not any("mamba_ops" in name for name in called), called
    torch._dynamo.reset()
    torch._inductor.utils.clear_caches()
print("right")
"""


def test_a_step_compiles_before_and_after_a_program_is_decomposed() -> None:
    """In a process in which Inductor was not imported before the ops were, and which finds no graph of another one."""
    anew = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    environment = {**os.environ, **anew, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = fresh.run(["-c", STEPS], env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["right"]
