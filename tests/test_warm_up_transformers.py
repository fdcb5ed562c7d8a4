"""A model of Transformers after use_mamba_ops: a warm-up calls its mixers as generate() does."""

import pytest

from tests.harness import compiled_for_a_gpu

pytest.importorskip("transformers", reason="needs mamba-ops[transformers]")

WARM = """
import torch, mamba_ops
from mamba_ops.compat.transformers import use_mamba_ops
from tests.transformers_models import new_model

torch.manual_seed(0)
torch.set_num_threads(1)
model = new_model(sys.argv[1], "cpu")
with use_mamba_ops(model), torch.no_grad():
    report = mamba_ops.warm_up(model, device="cpu")
    again = mamba_ops.warm_up(model, device="cpu")
    with mamba_ops.no_jit():
        for rows, length in ((2, 80), (1, 7), (1, 1)):
            tokens = torch.randint(3, 16, (rows, length))
            model(tokens, use_cache=False)
            model.generate(tokens, max_new_tokens=4, do_sample=False)
print(json.dumps([sorted({row.op.partition("::")[2] for row in report}), report.skipped, again.compiled]))
"""


@pytest.mark.parametrize(
    "name",
    [
        "mamba2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mamba", "falcon_mamba", "jamba", "qwen3_next", "qwen3_5", "olmo_hybrid")
        ),
    ],
)
def test_after_a_warm_up_generating_compiles_nothing(name):
    ran, skipped, again = compiled_for_a_gpu(WARM, name, compiles=False)
    assert skipped == []
    assert {"causal_conv1d", "causal_conv1d_update"} < set(ran)
    assert "rms_norm" in ran
    assert len(ran) == 5
    assert again == 0
