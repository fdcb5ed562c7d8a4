"""examples/backend_mamba_ssm, installed, on stand-ins of the CUDA modules that it calls (mamba_ssm_stand_ins)."""

import json
from pathlib import Path

import pytest

from tests.test_backend_plugin import ROOT, install, run, succeed

pytest.importorskip("setuptools", reason="installing the plug-in needs setuptools and pip")
pytest.importorskip("pip")

STAND_INS = ROOT / "tests" / "mamba_ssm_stand_ins"

# Judges every sample of an op on a backend, or says why it is refused.
JUDGE = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from mamba_ops import explain, registry, use_backend
from mamba_ops.registry import Sample
from tests.harness import judge

name, op, sizes = sys.argv[1], registry.ops()[sys.argv[2]], json.loads(sys.argv[3])
sizes = {{key: getattr(torch, value) if "dtype" in key else value for key, value in sizes.items()}}
registry.backends()
registry.dispatcher.dispatcher.backends[name].devices = ("cpu",)
said = {{}}
with use_backend(name):
    samples = op.make_samples("cpu", **sizes)
    for sample in [s for s in samples if s.kwargs.get("has_initial_state") is not None]:
        anew = dict(sample.kwargs, has_initial_state=None)
        samples.append(Sample(sample.name + ", from zero", sample.args, anew))
    for sample in samples:
        reason = explain(op, *sample.args, **sample.kwargs).reasons.get(name)
        if reason is None:
            judge(op, sample, op)
        said[sample.name] = reason or "right"
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed plug-in."""
    return install("backend_mamba_ssm", tmp_path_factory.mktemp("mamba_ssm"))


def judged(installed: Path, backend: str, op: str, **sizes: object) -> dict[str, str]:
    """For every sample of the op "right", or the sentence that refuses it."""
    code = f"import sys; sys.argv = ['', {backend!r}, {op!r}, {json.dumps(sizes)!r}]\n{JUDGE}"
    said: dict[str, str] = json.loads(succeed(code, installed, STAND_INS))
    return said


DTYPES = [{"dtype": dtype} for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("sizes", DTYPES, ids=str)
def test_the_selective_scan(installed: Path, sizes: dict[str, str]) -> None:
    said = judged(installed, "mamba_ssm", "selective_scan", **sizes)
    assert list(said.values()).count("right") >= 5
    float32 = sizes["dtype"] == "float32"
    sentences = {
        "takes no packed rows",
        "starts every row from zero, and has_initial_state is given",
        *(() if float32 else (f"takes out in x's {sizes['dtype']}, and it is float32",)),
    }
    assert {sentence for sentence in said.values() if sentence != "right"} <= sentences


@pytest.mark.parametrize("sizes", [{**dtypes, "state_dtype": dtypes["dtype"]} for dtypes in DTYPES], ids=str)
@pytest.mark.parametrize("op", ["causal_conv1d", "causal_conv1d_update"])
def test_the_convolution(installed: Path, op: str, sizes: dict[str, str]) -> None:
    said = judged(installed, "causal_conv1d", op, **sizes, **({"dim": 24} if op == "causal_conv1d" else {}))
    assert list(said.values()).count("right") >= 4


REFUSED = """
import torch
from mamba_ops import explain, registry
registry.backends()
for name in ("mamba_ssm", "causal_conv1d"):
    registry.dispatcher.dispatcher.backends[name].devices = ("cpu",)

def why(op, backend, *args, **kwargs):
    print(explain(op, *args, **kwargs).reasons[backend])

r = torch.randn
u, A, B = r(2, 5, 8), -torch.rand(8, 4), r(2, 5, 4)
scan = ("selective_scan", "mamba_ssm")
why(*scan, u.double(), u, A, B, B)
why(*scan, u, u.half(), A, B, B)
why(*scan, u, u, -torch.rand(8, 300), *r(2, 2, 5, 300))
why(*scan, *r(2, 2, 0, 8), A, *r(2, 2, 0, 4))
x, w = r(2, 6, 16), r(16, 4)
conv = ("causal_conv1d", "causal_conv1d")
why(*conv, x, r(16, 5))
why(*conv, r(2, 6, 12), r(12, 4))
why(*conv, r(2, 3, 16), w)
why(*conv, x.double(), w)
why(*conv, x, w, conv_state=r(4, 16, 3).half())
why(*conv, x.mT.contiguous().mT, w)
why(*conv, torch.cat([x, x[:, :, :4]], 2)[:, :, :16], w)
update = ("causal_conv1d_update", "causal_conv1d")
why(*update, r(2, 16), r(4, 16, 3).half(), w)
why(*update, r(2, 16), r(4, 16, 3), w, slots=torch.tensor([0, 1]), num_accepted_tokens=torch.tensor([1, 1]))
"""


def test_it_refuses_in_a_sentence(installed: Path) -> None:
    assert succeed(REFUSED, installed, STAND_INS).splitlines() == [
        "computes in float32, and x is float64",
        "takes dt in x's float32, and it is float16",
        "takes a dstate of at most 256, and A has 300",
        "takes at least one token, and there is none",
        "takes a width of at most 4, and weight has 5",
        "takes a dim that 8 divides, and it is 12",
        "takes rows of at least 4 tokens, and they have 3",
        "computes in float32, and x is float64",
        "takes conv_state in x's float32, and it is float16",
        "takes an x whose channels are side by side, and its strides are (96, 1, 6)",
        "takes an x whose tokens start at multiples of 8 numbers and 16 bytes, and not all of them do",
        "takes conv_state in x's float32, and it is float16",
        "does no speculative decoding",
    ]


def test_missing_kernels_say_what_to_install(installed: Path) -> None:
    code = """
from mamba_ops import registry
for backend in registry.backends():
    if backend.name in ("mamba_ssm", "causal_conv1d"):
        print(backend.name, backend.priority, backend.why_unusable("cuda"))
"""
    done = run(code, installed)
    assert done.stdout.splitlines() == [
        "causal_conv1d 15 causal_conv1d_cuda is not installed; pip install 'causal-conv1d'",
        "mamba_ssm 15 selective_scan_cuda is not installed; pip install 'mamba-ssm'",
    ], done.stderr
