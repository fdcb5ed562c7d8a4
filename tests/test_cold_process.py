"""What the first calls of a process cost: imports, kernels that are on disk, processes that compile."""

import io
import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from mamba_ops.cold_start import worker
from mamba_ops.cold_start.layers import call_norm, torchs_norms_of
from mamba_ops.ops._triton import _triton
from tests import fresh
from tests.harness import compiled_for_a_gpu

TAPE = """
import json, sys, torch
from mamba_ops.ops._triton.tape import Tape

with Tape([]) as tape:
    torch.empty(3)
print(json.dumps([tape.allocated, "torch._dynamo" in sys.modules]))
"""


def test_writing_down_what_a_launcher_does_imports_no_compiler():
    done = fresh.run(["-c", TAPE], env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[12], False]


KEYS = """
from triton.runtime.jit import JITFunction
from mamba_ops.cold_start.specialization import our_modules

kernels = {
    f"{value.module}.{value.__name__}": value
    for module in our_modules() for name, value in vars(module).items()
    if isinstance(value, JITFunction)
}
order = sorted(kernels, reverse=sys.argv[1] == "reverse")
print(json.dumps({name: kernels[name].cache_key for name in order}))
"""


def test_the_key_of_a_kernel_does_not_depend_on_what_was_compiled_before():
    one, other = (compiled_for_a_gpu(KEYS, order, compiles=False) for order in ("forward", "reverse"))
    assert len(one) > 60
    assert one == other


def test_the_longest_kernel_is_compiled_first(monkeypatch, capsys):
    short = ("mamba_ops.ops._triton.layout", "_transpose")
    long = ("mamba_ops.ops.causal_conv1d.triton.forward", "_kernel")
    of_short, of_long = (_triton.named(*name) for name in (short, long))
    assert worker.code_length(of_long) > len(of_long.fn.__code__.co_code) > worker.code_length(of_short) > 0
    done = []

    class Pool:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def apply(self, function, job):
            assert function is worker.compile_one
            done.append(job[0])
            return json.dumps(job[0]) + "\n"

    jobs = [[number, *(long if number in (2, 4) else short), ""] for number in range(6)]
    lines = [{"target": {}, "processes": 1}, *jobs]
    monkeypatch.setattr(worker.sys, "stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in lines)))
    monkeypatch.setattr(worker, "READING", 60)
    monkeypatch.setattr(worker.elsewhere, "compile_for", lambda target: None)
    monkeypatch.setattr(worker, "gc", SimpleNamespace(collect=int, freeze=int, disable=int))
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=lambda processes: Pool()))
    worker.main()
    assert done == [2, 4, 0, 1, 3, 5]
    assert capsys.readouterr().out.split() == [str(number) for number in done]


ENDS = """
import os, time, torch
from pathlib import Path
from mamba_ops.cold_start.loading import Loader

def group(number):
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return sum(fields[2] == str(number) for fields in stats)

loader = Loader(torch.device("cpu"), 3, None)
try:
    with loader.active():
        number, until = loader._worker.pid, time.monotonic() + 60
        while (most := group(number)) < 4 and time.monotonic() < until:
            time.sleep(0.05)
        raise KeyboardInterrupt
except KeyboardInterrupt:
    until = time.monotonic() + 10
    while (left := group(number)) and time.monotonic() < until:
        time.sleep(0.05)
print(json.dumps([most, left]))
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are counted in /proc")
def test_a_warm_up_that_is_broken_off_leaves_no_process(tmp_path):
    """Its worker starts at once where there is no kernel, but what Triton needs to launch one."""
    (tmp_path / "triton" / "ABC").mkdir(parents=True)
    (tmp_path / "triton" / "ABC" / "cuda_utils.so").touch()
    assert compiled_for_a_gpu(ENDS, TRITON_CACHE_DIR=str(tmp_path / "triton")) == [4, 0]


def test_norms_of_torchs_own_are_called_once_of_every_kind():
    model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8), nn.RMSNorm(8), nn.LayerNorm([2, 4]), nn.LayerNorm(8))
    norms = torchs_norms_of(model)
    assert [type(norm) for norm in norms] == [nn.RMSNorm, nn.LayerNorm, nn.LayerNorm]
    called = []
    for norm in norms:
        norm.register_forward_hook(lambda norm, args, output: called.append(tuple(args[0].shape[1:])))
        call_norm(norm.to(torch.bfloat16))
    assert called == [(8,), (8,), (2, 4), (2, 4), (8,), (8,)]
