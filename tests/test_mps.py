"""Apple's GPUs have torch's kernels alone, and no float64: what the backend `torch` does there, told without one."""

import json
from pathlib import Path

import pytest

from tests import fresh

CALLS = """
import collections, json
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from mamba_ops.audit import _torch, absent
from mamba_ops.registry import ops

# A device that is not here, as `mamba_ops.audit.absent` installs it; the number is that of c10/core/DeviceType.h.
absent._INDEX["mps"] = 13
absent._borrow_guard("mps")
_torch.set_value("torch._subclasses.fake_tensor:FakeTensorMode.avoid_device_init", True)


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "mps" and tensor.dtype == torch.float64:
                raise TypeError(f"{function} makes float64 on mps")
        return results


def there(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="mps")


counts = collections.Counter()
for name, op in ops().items():
    if op.returns or "torch" not in op.kernels:  # what it returns belongs to gradients, and is made elsewhere
        continue
    for number, sample in enumerate(op.sampler(torch.device("cpu"), dtype=torch.float16)):
        arguments = op.bind(sample.args, sample.kwargs)
        if any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in arguments.values()):
            continue
        if number % 4 and arguments.get("rounding_seed") is None:  # in fake tensors all of them take a minute
            continue
        with torch.no_grad(), FakeTensorMode(), NoFloat64():
            try:
                op.kernels["torch"].function(**{n: there(a) for n, a in arguments.items()})
                counts[name, "ran"] += 1
            except DataDependentOutputException:  # a length that is read on the host: a fake tensor has none
                counts[name, "read"] += 1
print(json.dumps([[*key, count] for key, count in counts.items()]))
"""


def test_the_reference_runs_there_and_makes_no_float64():
    """Shapes, dtypes and devices of every step; Apple's own kernels are not here."""
    done = fresh.run(["-c", CALLS], cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    counts = {(op, what): count for op, what, count in json.loads(done.stdout)}
    ran = {op for op, what in counts if what == "ran"}
    assert ran == {
        *("causal_conv1d", "causal_conv1d_update", "chunk_gated_delta_rule", "gated_delta_rule_update"),
        *("mamba_chunk_scan", "selective_scan", "selective_state_update", "chunk_kda", "kda_update", "rms_norm"),
    }
    assert {op for op, what in counts if what == "read"} <= {"gated_delta_rule_update", "selective_state_update"}
    assert sum(n for (_, what), n in counts.items() if what == "ran") > 40


@pytest.mark.parametrize(("name", "reason"), [("triton", "runs on cuda, xpu, not on mps"), ("torch", None)])
def test_backends_say_whether_they_run_there(name, reason):
    from mamba_ops.registry import backends

    [backend] = [known for known in backends() if known.name == name]
    assert backend.why_unusable("mps") == reason
