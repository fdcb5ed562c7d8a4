"""The tests are tested: bugs planted in each kernel's source, one at a time, are all caught by `judge`.

Only bugs that stay inside their tensors: an interpreted kernel that leaves them takes the process with it.
"""

import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mamba_ops.kernels.triton as kernels
from mamba_ops import registry
from mamba_ops.registry import Backend, Op
from tests.conftest import ACCELERATOR
from tests.harness import front_on, judge

pytest.importorskip("triton", reason="the kernels that bugs are planted in are Triton's")

DEVICE = ACCELERATOR or torch.device("cpu")
CONV = {  # bug: (the kernel's text, what stands there instead)
    "window off by one": ("tl.maximum(oldest, 0)", "tl.maximum(oldest + 1, 0)"),
    "taps reversed": ("acc += window[k] * taps[k]", "acc += window[WIDTH - 1 - k] * taps[k]"),
    "bias dropped": ("acc = bias\n", "acc = bias * 0\n"),
    "silu always": ("        if SILU:", "        if True:"),
    "silu inverted": ("acc *= tl.sigmoid(acc)", "acc *= tl.sigmoid(-acc)"),
    "state not written": ("    if accepted_ptr is None:\n        for k", "    if False:\n        for k"),
    "state shifted by one token only": (
        "window = window[1:]",
        "window = window[1:] if length is None else window[:-1]",
    ),
    "null rows not zeroed": ("output_channel), 0.0, mask=inside)", "output_channel), 1.0, mask=inside)"),
    "null slot ignored": ("if (slot < 0) | (slot == null_slot):", "if slot < 0:"),
    "old columns kept when speculating": ("tl.static_range(1, HISTORY)", "tl.static_range(2, HISTORY)"),
    "packed rows taken for single tokens": ("x_ptr += first * x_row", "x_ptr += row * x_row"),
}
PREFILL = {
    "window off by one": ("window[t + k] * taps[k]", "window[t + (k + 1) % WIDTH] * taps[k]"),
    "taps reversed": ("window[t + k] * taps[k]", "window[t + k] * taps[WIDTH - 1 - k]"),
    "bias dropped": ("acc = bias\n", "acc = bias * 0\n"),
    "silu always": ("        if SILU:", "        if True:"),
    "tiles start from zeros": ("(token >= 0)", "(token >= begin)"),
    "sequences see the one before": ("(token >= 0)", "(token >= -first)"),
    "first tile only": ("tile %= tiles", "tile = 0"),
    "tiles of the wrong sequence": ("+ middle <= tile:", "+ middle < tile:"),
    "initial state ignored": (".to(tl.int32) * HISTORY", ".to(tl.int32) * 0"),
    "initial state assumed": (".to(tl.int32) * HISTORY", ".to(tl.int32) * 0 + HISTORY"),
    "state not written": ("kept[k], mask=inside)", "kept[k], mask=inside & (tokens < 0))"),
    "state of short sequences forgotten": ("tl.where(entry < HISTORY, old, new)", "new"),
    "state not moved by short sequences": ("state_ptr + entry * state_column", "state_ptr + k * state_column"),
    "null sequences not zeroed": ("output_channel), 0.0, mask=live)", "output_channel), 1.0, mask=live)"),
    "null slot ignored": ("if (slot < 0) | (slot == null_slot):", "if slot < 0:"),
}
SSU = {
    "wrong group": ("head // (HEADS // GROUPS)", "head % GROUPS"),
    "softplus always": ("        if SOFTPLUS:", "        if True:"),
    "bias dropped": ("            d += bias", "            d += 0 * bias"),
    "D dropped": ("y += u * skip", "y += 0 * u * skip"),
    "gate without sigmoid": ("y *= gate * tl.sigmoid(gate)", "y *= gate"),
    "decay with the wrong sign": ("tl.exp(a * d)", "tl.exp(-a * d)"),
    "output from the old state": ("tl.sum(s * c[None, :]", "tl.sum((s - (b[None, :] * d) * u[:, None]) * c[None, :]"),
    "state not written": ("    if num_accepted_tokens is None:\n        if", "    if False:\n        if"),
    "write slots ignored": ("        if write_slots is None:", "        if True:"),
    "null destination written": ("if (target >= 0) & (target != null_slot):", "if target >= 0:"),
    "null rows not zeroed": ("tl.zeros([BLOCK], tl.float32)", "tl.full([BLOCK], 1.0, tl.float32)"),
    "null slot ignored": ("if (source < 0) | (source == null_slot):", "if source < 0:"),
    "accepted column off by one": ("slots_columns) - 1", "slots_columns - 1)"),
    "state rounded between tokens": ("u[:, None]\n", "u[:, None]\n        s = s.to(tl.bfloat16).to(tl.float32)\n"),
    "first token only": ("    for t in range(tokens):\n        token", "    for t in range(1):\n        token"),
}
SSD = {
    "wrong group": ("head // (HEADS // GROUPS)", "head % GROUPS"),
    "softplus always": ("    if SOFTPLUS:", "    if True:"),
    "dt not limited": ("tl.minimum(tl.maximum(d, dt_min), dt_max)", "d"),
    "tokens not decayed to the chunk's end": ("reverse=True) - log_decay) * d", "reverse=True) * 0.0) * d"),
    "state not decayed over a chunk": ("s *= tl.exp2(tl.load(decay + high - 1))", "s *= 1.0"),
    "token does not read itself": ("token[:, None] >= t[None, :]", "token[:, None] > t[None, :]"),
    "state before the chunk not read": ("    if past > 0:", "    if past > 1:"),
    "initial state not read": ("past |= tl.load(has_initial_state", "past |= 0 * tl.load(has_initial_state"),
    "chunks do not end at absolute positions": ("before = (tl.load", "before = 0 * (tl.load"),
    "null rows not zeroed": ("tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32), written", "1.0, written"),
}
SSD_TOO = {  # slow: interpreted matrix products
    "bias dropped": ("d += tl.load(dt_bias", "d += 0.0 * tl.load(dt_bias"),
    "start of a long chunk dropped": ("range(begin, tl.minimum(", "range(first, tl.minimum("),
    "state of the chunk before last": ("(number - 1).to(tl.int64) * kept_stride", "number.to(tl.int64) * kept_stride"),
    "last chunk's state not kept": (
        "        if chunk_states is not None:\n            tl.store(",
        "        if 0:\n            tl.store(",
    ),
    "null slot ignored": ("if (source < 0) | (source == null_slot):", "if source < 0:"),
    "null destination written": ("& (target >= 0) & (target != null_slot)", "& (target >= 0)"),
    "write slots ignored": ("        if write_slots is not None:", "        if False:"),
    "empty row resets its state": ("stored = count > 0", "stored = count >= 0"),
    "D dropped": ("y += u * tl.load(D + head)", "y += 0.0 * u * tl.load(D + head)"),
    "gate without sigmoid": ("y *= gate * tl.sigmoid(gate)", "y *= gate"),
}
TABLES = {
    "causal_conv1d": PREFILL,
    "causal_conv1d_update": CONV,
    "mamba_chunk_scan": SSD,
    "selective_state_update": SSU,
}
MUTANTS = [
    pytest.param((op, *bug), marks=marks, id=f"{op}-{bug[0]}")
    for tables, marks in ((TABLES, ()), ({"mamba_chunk_scan": SSD_TOO}, pytest.mark.slow))
    for op, table in tables.items()
    for bug in table.items()
]


@pytest.fixture
def planted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Op[...], str]]:
    """An op, and the name of a backend whose kernel is ours with one bug in it."""
    name, _, (right, wrong) = request.param
    op = registry.ops()[name]
    source = (Path(kernels.__path__[0]) / f"{name}.py").read_text()
    assert right in source, f"{right!r} is no longer in the kernel; plant the bug elsewhere"
    mutant = _load(tmp_path / f"mutant_{name}.py", source.replace(right, wrong))
    backend = Backend("mutant", devices=[DEVICE.type])
    original = op.kernels["triton"].function
    here = f"mamba_ops.kernels.triton.{name}"

    @functools.wraps(original)
    def kernel(*args: object, **kwargs: object) -> None:
        healthy, sys.modules[here] = sys.modules.get(here), mutant
        try:
            original(*args, **kwargs)
        finally:
            sys.modules.pop(here) if healthy is None else sys.modules.update({here: healthy})

    backend.implements(op)(kernel)
    yield op, backend.name
    backend.remove()


@pytest.mark.parametrize("planted", MUTANTS, indirect=True)
def test_planted_bug_is_caught(planted: tuple[Op[...], str]) -> None:
    op, backend = planted
    for sample in op.make_samples(DEVICE):
        try:
            judge(op, sample, front_on(op, backend))
        except AssertionError:
            return
    pytest.fail("no sample caught it")


def _load(path: Path, source: str) -> ModuleType:
    path.write_text(source)  # Triton reads the source of its kernels from a file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
