"""What varies from call to call makes Triton compile nothing: read off the kernels' sources, and counted."""

import importlib.util
import sys

import pytest
import torch

from mamba_ops.cold_start.specialization import audit_sources, our_modules
from mamba_ops.cold_start.variants import audit_specialization
from tests.harness import compiled_for_a_gpu

KERNEL = """
import torch
import triton
import triton.language as tl

@triton.autotune([triton.Config({{}})], key=[{key}])
@triton.jit(do_not_specialize=[{numbers}], do_not_specialize_on_alignment=["x", "y"])
def _kernel(x, y, scratch, tokens, stride, {extra}):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    {first}
    v = tl.load(x + i * stride, i < tokens, other=0.0)
    tl.store(scratch + i, v, i < tokens)
    tl.store(y + i, v, i < tokens)

def call(x, y):
    scratch = torch.empty_like(x)
    _kernel[(triton.cdiv(x.shape[0], 16),)](x, y, scratch, x.shape[0], x.stride(0), {given})
"""
CLEAN = {
    "key": "'BLOCK'",
    "numbers": "'tokens', 'stride'",
    "extra": "BLOCK: tl.constexpr",
    "first": "",
    "given": "BLOCK=16",
}
DEFECTS = {
    "never read": (
        "chunks",
        {"numbers": "'tokens', 'stride', 'chunks'", "extra": "chunks, BLOCK: tl.constexpr", "given": "3, BLOCK=16"},
    ),
    "is overwritten before": ("tokens", {"first": "tokens = 16"}),
    "is a constexpr and varies": (
        "LENGTH",
        {"extra": "BLOCK: tl.constexpr, LENGTH: tl.constexpr", "given": "16, x.shape[0]", "first": "i += LENGTH"},
    ),
    "is an autotune key and varies": ("tokens", {"key": "'BLOCK', 'tokens'"}),
    "is a number that Triton compiles for": ("stride", {"numbers": "'tokens'"}),
    "is compiled for by its value or alignment": (
        "bias",
        {"extra": "bias, BLOCK: tl.constexpr", "given": "y[3:], BLOCK=16", "first": "i += tl.load(bias).to(tl.int32)"},
    ),
}


def written(folder, **changes):
    """The kernel above with changes, as a module."""
    path = folder / "written_kernel.py"
    path.write_text(KERNEL.format(**CLEAN | changes))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_kernel_of_ours_has_a_defect():
    assert [str(finding) for finding in audit_sources(*our_modules())] == []


def test_a_clean_kernel_has_none(tmp_path):
    assert audit_sources(written(tmp_path)) == []


@pytest.mark.parametrize("problem", DEFECTS)
def test_a_kernel_with_each_defect_is_found(problem, tmp_path):
    argument, changes = DEFECTS[problem]
    (finding,) = audit_sources(written(tmp_path, **changes))
    assert (finding.kernel, finding.argument) == ("written_kernel._kernel", argument)
    assert problem in finding.problem


@pytest.mark.parametrize(
    ("first", "unread"),
    [
        ("stride += 1", []),
        ("if tokens > 3:\n        stride = 1", []),
        ("if tokens > 3:\n        stride = 1\n    else:\n        stride = 2", ["stride"]),
        ("for _ in range(tokens):\n        stride = 1", []),
        ("stride, tokens = 1, tokens + 1", ["stride"]),
        ("stride = stride * 2", []),
        ("if tokens > 3:\n        return\n    stride = 1", ["stride"]),
    ],
)
def test_what_is_overwritten_first_is_read_off_the_paths(first, unread, tmp_path):
    assert [finding.argument for finding in audit_sources(written(tmp_path, first=first))] == unread


def test_random_calls_ask_for_two_variants_or_as_many_as_there_is_a_reason_for():
    report = compiled_for_a_gpu(
        "import json\n"
        "from mamba_ops.cold_start.variants import audit_specialization\n"
        "audit = audit_specialization('cpu')\n"
        "print(json.dumps([audit.problems, [v._asdict() for v in audit.variants], str(audit)]))"
    )
    problems, variants, text = report
    sys.stdout.write(text)
    assert problems == []
    assert {v["kernel"] for v in variants} >= {
        f"{m.__name__.rpartition('.')[2]}.{f}" for m in our_modules() for f in vars(m) if f in LAUNCHED
    }
    assert max(v["variants"] for v in variants) > 1  # alignment was varied


LAUNCHED = ("_kernel", "_prepare", "_states", "_outputs", "_solve", "_scan", "_ends", "_starts", "_transpose")

COUNT = """
import importlib.util, json, random, torch
from mamba_ops.cold_start.variants import variants_of

found = {}
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("written_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module._kernel, "fn"):
        module._kernel = module._kernel.fn  # without its autotuner, which would run it

    def call():
        stride, begin = random.choice([1, 2, 3, 16]), random.choice([0, 0, 1])
        x = torch.zeros(4096)[begin :: stride][: random.choice([1, 16, 17, 31, 64])]
        module.call(x, torch.zeros(2 * x.shape[0] + 2)[begin:])

    random.seed(0)
    asked = variants_of([module], [call] * 30)
    found[path] = max(map(len, asked.values()))
print(json.dumps(found))
"""


def test_what_the_sources_tell_is_what_triton_does(tmp_path):
    paths = {}
    for name, changes in {
        "clean": {},
        "LENGTH": DEFECTS["is a constexpr and varies"][1],
        "stride": DEFECTS["is a number that Triton compiles for"][1],
        "bias": DEFECTS["is compiled for by its value or alignment"][1],
    }.items():
        paths[name] = tmp_path / name / "written_kernel.py"
        paths[name].parent.mkdir()
        written(paths[name].parent, **changes)
    found = compiled_for_a_gpu(COUNT, *paths.values())
    assert {name: found[str(path)] for name, path in paths.items()} == {
        "clean": 1,
        "LENGTH": pytest.approx(5, abs=1),
        "stride": 3,
        "bias": 2,
    }


@pytest.mark.gpu
@pytest.mark.slow
def test_as_many_variants_are_compiled_on_a_gpu(device):
    audit = audit_specialization(device, compiles=True)
    sys.stdout.write(str(audit))
    assert audit.problems == []
    torch.get_device_module(device).synchronize()
