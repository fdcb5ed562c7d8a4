"""Without a private name of torch an audit still gives a report, with less detail; one warning says what is lost."""

import ast
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_ops.audit import _torch

ROOT = Path(__file__).parents[2]

# Torch itself uses these names, so they are not deleted but hidden from the file that collects them.
PROGRAM = r"""
import contextlib, importlib.util, json, sys, warnings

import torch
import torch._dynamo

from compile_tests.planted import breaks, ops, unseen
from mamba_ops.audit import _torch, absent, audit, tries
from mamba_ops.audit.absent_code import traced_as_if_present
from mamba_ops.commands.watch import watch_compiler

INSTANCES = "Node", "OpOverload", "UntypedStorage"  # classes whose attributes are read of their instances


def is_asked_by(file, depth):
    return sys._getframe(depth).f_code.co_filename.endswith(file)


class Without:
    def __init__(self, cls, name):
        vars(self).update(cls=cls, name=name)

    def __setattr__(self, name, value):
        setattr(self.cls, name, value)

    def __delattr__(self, name):
        delattr(self.cls, name)

    def __getattr__(self, name):
        if name == self.name:
            raise AttributeError(name)
        return getattr(self.cls, name)

    def __call__(self, *args, **kwargs):
        return self.cls(*args, **kwargs)


@contextlib.contextmanager
def hidden(name):
    module, _, path = name.partition(":")
    owner, _, last = path.rpartition(".")
    with contextlib.ExitStack() as stack:
        if owner in INSTANCES:
            hide(stack, getattr(importlib.import_module(module), owner), last)
        else:
            for holder in (module, *_torch.PRIVATE[name].also_in):
                hide_in_module(stack, importlib.import_module(holder), owner or last, last if owner else None)
        yield


def hide_in_module(stack, module, name, attribute):
    cls = type(module)
    fallback = getattr(cls, "__getattr__", None)

    def get(self, asked):  # after __getattribute__ has failed
        if fallback is None or attribute is None and asked == name and is_asked_by("audit/_torch.py", 2):
            raise AttributeError(asked)
        return fallback(self, asked)

    object.__setattr__(module, "__class__", type(cls.__name__, (cls,), {"__getattr__": get}))
    stack.callback(object.__setattr__, module, "__class__", cls)
    hide(stack, module.__class__, name, (lambda value: Without(value, attribute)) if attribute else None)


def hide(stack, cls, name, change=None):
    found = cls.__getattribute__

    def get(self, asked):
        if asked == name and is_asked_by("audit/_torch.py", 2):
            if change is None:
                raise AttributeError(asked)
            return change(found(self, asked))
        return found(self, asked)

    cls.__getattribute__ = get
    stack.callback(delattr, cls, "__getattribute__")


class Several(ops.WithState):
    def forward(self, x):
        y = self.proj(x)
        if y.sum() > 1e6:
            return y
        y = ops.ops.hidden(self.state, y[:4]) + ops.ops.alias(y[:4])
        return y * (2.0 if x.shape[0] > 8 else 3.0)


class OnDevice(breaks.Base):
    def forward(self, x, state):
        y = self.proj(x) * torch.tensor(2.0, device=x.device)
        state.add_(y)
        if HAS_TRITON:
            y = launched(y)
        print("a break")
        return y * y.sum().item()


HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from compile_tests.planted.launch import _double

    def launched(y):
        out = torch.empty_like(y)
        _double[(1,)](y, out, y.numel(), BLOCK=32)
        return out


def audited(device, name):
    if device != "cpu":
        absent._installed.clear()
        absent.fake_mode.cache_clear()
        with contextlib.suppress(_torch.MissingNameError), traced_as_if_present(device):
            pass
        return audit(OnDevice(), breaks.x(), torch.zeros(4, 8), device=device)
    calls = [(torch.randn(rows, 8),) for rows in (4, 12)]
    with _torch.flags({"recompile_limit": 8}), _torch.traced_to(sys.argv[0]):
        for how in ("dynamic", "unbacked"):
            tries.mark([torch.randn(rows, 8) for rows in (4, 12)], how)
    return audit(Several(), *calls[0], calls=calls[1:], copies=name == _torch.COPIES)


NEED_LOOPS = (_torch.LOOPS, _torch.CALLS)
NEED_ERRORS = ("torch._dynamo.exc:unimplemented",)


def watched():
    with watch_compiler() as watch:
        for size in (3, 4):
            torch.compile(lambda x: x + 1, backend="eager", dynamic=False)(torch.zeros(size))
    return [watch.graphs, watch.compiles]


def check(device, name):
    _torch._missing.clear()
    with warnings.catch_warnings(record=True) as caught, contextlib.ExitStack() as stack:
        warnings.simplefilter("always")
        if name:
            stack.enter_context(hidden(name))
        if name == _torch.CUDA_GRAPHS:
            is_available = torch.accelerator.is_available
            stack.callback(setattr, torch.accelerator, "is_available", is_available)
            torch.accelerator.is_available = lambda: is_asked_by("audit/collect.py", 2) or is_available()
        report = audited(device, name)
        if name in NEED_LOOPS:
            audit(breaks.LoopWithBreak(2), breaks.x())
        if name in NEED_ERRORS:
            audit(unseen.AfterError(), breaks.x())
        if device == "cpu":
            watch = watched()
            _torch.traced_stack()
    return {
        "findings": sorted({f.cause for f in report.findings}),
        "located": sorted({f.cause for f in report.findings if f.where}),
        "graphs": [row.graphs for row in report.calls],
        "recompiles": [row.recompiles for row in report.calls],
        "watch": watch if device == "cpu" else None,
        "finished": report.finished,
        "notes": report.notes,
        "warnings": [str(w.message) for w in caught if "this torch has no" in str(w.message)],
    }


device, *names = sys.argv[1:]
torch.compile(lambda x: x + 1, backend="aot_eager")(torch.zeros(2))  # what torch binds at first use is bound
with torch.no_grad():
    for name in ["", *names]:
        print("RESULT", json.dumps([name, check(device, name)]), flush=True)
"""

FOR_ABSENT_DEVICES = (
    _torch.HAS_TRITON,
    "torch._dynamo.backends.common:aot_autograd",
    "torch._dynamo.utils:clear_compilation_metrics",
    "torch._dynamo.utils:get_compilation_metrics",
    "torch._dynamo.utils:graph_break_reasons",
    "torch._dynamo.utils:set_compilation_metrics_limit",
    "torch._dynamo.variables:ctx_manager",
    "torch._guards:TracingContext.try_get",
    "torch._higher_order_ops.triton_kernel_wrap:kernel_side_table",
    "torch.fx:Node._pretty_print_target",
    "torch.nn:Module._apply",
    "torch.fx.experimental.proxy_tensor:CONSTANT_NUMEL_LIMIT",
    "torch.fx.experimental.symbolic_shapes:ShapeEnv",
    *(name for name in _torch.PRIVATE if name.startswith("torch._subclasses")),
)
NEED_TRITON = (_torch.HAS_TRITON, "torch._higher_order_ops.triton_kernel_wrap:kernel_side_table")
NEVER_TRACED = tuple(f"torch._subclasses.fake_tensor:{name}" for name in ("FakeTensor", "FakeTensorMode"))

# What the audit does not find, or finds otherwise; without any other name it finds the same.
LOST = {
    "torch._ops:OpOverload._schema": {"alias", "hidden-mutation"},
    "torch.utils._python_dispatch:TorchDispatchMode": {"alias", "hidden-mutation"},
    "torch._dynamo.backends.common:aot_autograd": {"capture-input"},
    "torch._guards:TracingContext.try_get": {"assumed-values", "capture-input"},
    "torch._subclasses.fake_tensor:DataDependentOutputException": {"assumed-values"},
    _torch.HAS_TRITON: {"assumed-values", "triton", "print", "item"},
    "torch.fx.experimental.proxy_tensor:CONSTANT_NUMEL_LIMIT": {"assumed-values", "capture-input", "item", "triton"},
    **{name: {"assumed-values", "capture-input", "item", "print", "triton"} for name in NEVER_TRACED},
}


def start(device: str, names: list[str], folder: Path) -> subprocess.Popen[str]:
    program = folder / f"audit_on_{device}.py"
    program.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, str(program), device, *names],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)  # an audit for each name
def test_an_audit_without_a_private_name_still_reports(tmp_path: Path) -> None:
    absent = next(kind for kind in ("cuda", "xpu") if not torch.get_device_module(kind).is_available())
    has_triton = importlib.util.find_spec("triton") is not None
    names = [name for name in _torch.PRIVATE if has_triton or name not in NEED_TRITON]
    here = [name for name in names if name not in FOR_ABSENT_DEVICES]
    with start("cpu", here, tmp_path) as on_cpu, start(absent, sorted({*names} - {*here}), tmp_path) as on_absent:
        found = [results(process) for process in (on_cpu, on_absent)]
    for whole, without in ((process.pop(""), process) for process in found):
        assert whole["warnings"] == []
        for name, report in without.items():
            assert len(report["warnings"]) == 1, (name, report["warnings"])
            [warning] = report["warnings"]
            assert warning.startswith(f"this torch has no {name.partition(':')[2]}: "), name
            assert report["finished"], name
            for kind in ("findings", "located"):
                assert set(whole[kind]) - set(report[kind]) == LOST.get(name, set()) & set(whole[kind]), name
            if name not in LOST:
                assert (report["graphs"], report["recompiles"]) == (whole["graphs"], whole["recompiles"]), name
            if name != "torch._dynamo.utils:counters":
                assert report["watch"] == whole["watch"], name
    assert sum(map(len, found)) == len(names)


def results(process: "subprocess.Popen[str]") -> dict[str, Any]:
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    lines = [line.removeprefix("RESULT ") for line in stdout.splitlines() if line.startswith("RESULT ")]
    return dict(json.loads(line) for line in lines)


def test_private_names_of_torch_stand_in_one_file() -> None:
    folders = (ROOT / "mamba_ops" / "audit", ROOT / "mamba_ops" / "commands")
    sources = [path for folder in folders for path in folder.rglob("*.py") if path.name != "_torch.py"]
    assert len(sources) > 20
    found = [f"{path.name}: {name}" for path in sources for name in private_names(path)]
    assert set(found) == {"absent.py: torch._C"}  # the library with the table of device guards; without it, a compiler


def private_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from (name for name in names if name.startswith("torch._"))
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            name = ast.unparse(node)
            if name.startswith("torch.") and not name.startswith("torch.ops."):
                yield name


def test_what_stands_for_a_private_function_takes_what_newer_releases_ask_with():
    """Torch 2.15 says whether it means the CPU too; the audit called that an error of the compiler."""
    from torch.utils import _triton

    found = importlib.util.find_spec("triton") is not None
    with contextlib.ExitStack() as stack:
        _torch.let_triton_be_found(stack)
        assert _triton.has_triton(include_cpu=True) is found
        assert _triton.has_triton() is found
