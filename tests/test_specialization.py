"""What varies from call to call makes Triton compile nothing, as is counted; no argument of a kernel is unused."""

import importlib.util
import inspect
import sys

import pytest
import torch

from mamba_ops.cold_start.specialization import audit_sources, our_modules
from mamba_ops.cold_start.variants import audit_specialization
from mamba_ops.ops._triton import op_of
from tests.harness import compiled_for_a_gpu

KERNEL = """
import torch
import triton
import triton.language as tl
from mamba_ops.ops._triton.common import kernel

{decorator}
def _kernel(x, y, scratch, {tensors}tokens, stride, {extra}):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    {first}
    v = tl.load(x + i * stride, i < tokens, other=0.0)
    tl.store(scratch + i, v, i < tokens)
    tl.store(y + i, v, i < tokens)

def call(x, y):
    scratch = torch.empty_like(x)
    _kernel[(triton.cdiv(x.shape[0], 16),)](x, y, scratch, {given_tensors}x.shape[0], x.stride(0), {given})
"""
DECORATOR = "@kernel(first_number='tokens', static='scratch')"
CLEAN = {
    "decorator": DECORATOR,
    "tensors": "",
    "given_tensors": "",
    "extra": "BLOCK: tl.constexpr",
    "first": "",
    "given": "BLOCK=16",
}
DEFECTS = {
    "never read": ("chunks", {"extra": "chunks, BLOCK: tl.constexpr", "given": "3, BLOCK=16"}),
    "is overwritten before": ("tokens", {"first": "tokens = 16"}),
    "is tuned on a call": ("", {"decorator": f"@triton.autotune([triton.Config({{}})], key=['tokens'])\n{DECORATOR}"}),
}
COUNTED = {
    "clean": ({}, 1),
    "a constexpr that varies": (
        {"extra": "BLOCK: tl.constexpr, LENGTH: tl.constexpr", "given": "16, x.shape[0]", "first": "i += LENGTH"},
        pytest.approx(5, abs=1),
    ),
    "a number that Triton compiles for": (
        {
            "decorator": "@triton.jit(do_not_specialize=['tokens'], do_not_specialize_on_alignment=['x', 'y'])",
        },
        3,
    ),
    "an address that is not static": (
        {
            "decorator": "@kernel(first_number='tokens', static='scratch bias')",
            "tensors": "bias, ",
            "given_tensors": "y[:1], ",
            "first": "i += tl.load(bias).to(tl.int32)",
        },
        2,
    ),
    "the same under the default": (
        {"tensors": "bias, ", "given_tensors": "y[:1], ", "first": "i += tl.load(bias).to(tl.int32)"},
        1,
    ),
}
"""Changes of the kernel, and how many variants of it random calls ask for."""


def written(folder, **changes):
    """The kernel above with changes, as a module."""
    path = folder / "written_kernel.py"
    path.write_text(KERNEL.format(**CLEAN | changes))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_kernel_of_ours_has_a_defect():
    functions = [f for m in our_modules() for f in vars(m).values() if inspect.isfunction(getattr(f, "fn", None))]
    assert len(functions) > 30
    assert [str(finding) for finding in audit_sources(*our_modules())] == []


def test_a_clean_kernel_has_none(tmp_path):
    assert audit_sources(written(tmp_path)) == []


@pytest.mark.parametrize("problem", DEFECTS)
def test_a_kernel_with_each_defect_is_found(problem, tmp_path):
    argument, changes = DEFECTS[problem]
    (finding,) = audit_sources(written(tmp_path, **changes))
    assert (finding.kernel, finding.argument) == ("written_kernel._kernel", argument)
    assert problem in finding.problem


@pytest.mark.parametrize("static", ["stride", "BLOCK", "no_such_tensor"])
def test_static_arguments_are_tensors(static, tmp_path):
    with pytest.raises(ValueError, match=f"_kernel: static: got {static}, expected tensors"):
        written(tmp_path, decorator=f"@kernel(first_number='tokens', static='{static}')")


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
        f"{op_of(m.__name__)}.{f}" for m in our_modules() for f in vars(m) if f in LAUNCHED
    }
    assert max(v["variants"] for v in variants) > 1  # alignment was varied


LAUNCHED = (
    "_kernel",
    "_steps",
    "_states",
    "_outputs",
    "_decay",
    "_steep_pairs",
    "_solve",
    "_scan",
    "_ends",
    "_starts",
    "_transpose",
)

COUNT = """
import importlib.util, json, random, torch
from mamba_ops.cold_start.variants import variants_of

found = {}
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("written_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call():
        stride, begin = random.choice([1, 2, 3, 16]), random.choice([0, 0, 1])
        x = torch.zeros(4096)[begin :: stride][: random.choice([1, 16, 17, 31, 64])]
        module.call(x, torch.zeros(2 * x.shape[0] + 2)[begin:])

    random.seed(0)
    asked = variants_of([module], [call] * 30)
    found[path] = max(map(len, asked.values()))
print(json.dumps(found))
"""


def test_variants_are_counted_and_numbers_and_addresses_that_vary_make_none(tmp_path):
    paths = {}
    for name, (changes, _) in COUNTED.items():
        paths[name] = tmp_path / name.replace(" ", "_") / "written_kernel.py"
        paths[name].parent.mkdir()
        written(paths[name].parent, **changes)
    found = compiled_for_a_gpu(COUNT, *paths.values())
    assert {name: found[str(path)] for name, path in paths.items()} == {n: count for n, (_, count) in COUNTED.items()}


@pytest.mark.gpu
@pytest.mark.slow
def test_as_many_variants_are_compiled_on_a_gpu(device):
    audit = audit_specialization(device, compiles=True)
    sys.stdout.write(str(audit))
    assert audit.problems == []
    torch.get_device_module(device).synchronize()


LARGE = """
import torch, triton
import mamba_ops
from mamba_ops.cold_start.specialization import our_modules
from mamba_ops.cold_start.targets import StandIn, target_of
from mamba_ops.cold_start.variants import variants_of
from mamba_ops.ops._triton import launch_config

triton.runtime.driver.set_active(StandIn(target_of("gfx942")))
launch_config.forget_device()

def call(slots):
    sample = mamba_ops.selective_state_update.make_samples("cpu")[0]
    state = torch.empty(slots, *sample.args[0].shape[1:])  # memory that is never touched
    mamba_ops.selective_state_update(state, *sample.args[1:], **sample.kwargs)

asked = variants_of(our_modules(), [lambda n=n: call(n) for n in (9, 3 * 2**30 // (4 * 4 * 8 * 16) + 9)])
print(json.dumps({function: len(keys) for (_, function), keys in asked.items()}))
"""


def test_a_cache_of_more_than_2_gib_makes_no_variant_on_amd():
    assert compiled_for_a_gpu(LARGE) == {"_kernel": 1}
