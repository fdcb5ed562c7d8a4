"""Transformers finds our names where it looks for mamba_ssm, causal_conv1d and fla, and computes what it did."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from tests import fresh
from tests.transformers_models import VOCABULARY, new_model

MODELS = ("mamba", "mamba2", "qwen3_5", "lfm2")
OPS = {
    "mamba": "selective_scan",
    "mamba2": "mamba_chunk_scan",
    "qwen3_5": "chunk_gated_delta_rule",
    "lfm2": "causal_conv1d",
}
SCRIPT = """
import json, sys, warnings
warnings.simplefilter("error")
import torch
from mamba_ops.compat import install
install("mamba_ssm", "causal_conv1d", "fla")
from mamba_ops.registry import record_selections
from tests.test_compat_install_transformers import answers, MODELS
import transformers.utils.import_utils as checks
found = {}
for name in MODELS:
    with record_selections() as record:
        found[name] = answers(name)
    found[name].append(sorted({run.op for run in record}))
found["checks"] = [
    checks._is_package_available(name, return_version=True) for name in ("mamba_ssm", "causal_conv1d", "fla")
]
print(json.dumps(found))
"""


def answers(name: str) -> list[object]:
    torch.manual_seed(0)
    model = new_model(name, "cpu")
    tokens = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens).logits
        made = model.generate(tokens, max_new_tokens=8, do_sample=False)
    model(tokens, labels=tokens).loss.backward()
    grads = [p.grad.square().sum().item() for p in model.parameters() if p.grad is not None]
    return [logits[0].tolist(), made.tolist(), grads]


def test_transformers_takes_its_fast_path() -> None:
    run = fresh.run(["-c", SCRIPT])
    assert run.returncode == 0, run.stderr
    assert "is falling back" not in run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert [is_there for is_there, _ in found["checks"]] == [True] * 3
    for name in MODELS:
        logits, made, grads, ops = found[name]
        want_logits, want_made, want_grads = answers(name)
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(want_logits), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(grads), torch.tensor(want_grads), rtol=1e-3, atol=1e-6)
        assert made == want_made
        assert any(OPS[name] in op for op in ops), ops
