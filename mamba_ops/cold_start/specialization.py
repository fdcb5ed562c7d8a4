"""Defects of Triton kernels that their sources show: arguments that are never read, and tuning on a call.

An argument that is never read still costs the launch time, and may make Triton compile the kernel again. What makes
Triton compile again is not read off the sources: `kernel` in `mamba_ops.ops._triton.common` leaves it nothing that
varies, and `variants` counts.
"""

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from mamba_ops.ops._triton import op_of
from mamba_ops.registry import ops


class Finding(NamedTuple):
    """A defect of a kernel.

    Attributes:
        kernel: `op.function`, or of a shared module `module.function`.
        argument: the argument that it is about, or the empty string.
        problem: what is wrong, and what to do.
    """

    kernel: str
    argument: str
    problem: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.argument} {self.problem}" if self.argument else f"{self.kernel}: {self.problem}"


def audit_sources(*modules: ModuleType) -> list[Finding]:
    """Return the defects of all Triton functions in these modules. Nothing is compiled or run, and no GPU is needed.

    An argument is a defect if it is never read, or is overwritten before it is read. So is autotuning: the kernel is
    timed on a call, and each rank may choose another configuration.
    """
    return [finding for module in modules for finding in _audit(module)]


def our_modules() -> list[ModuleType]:
    """Import and return the modules that hold the Triton kernels of all ops, and what these share."""
    paths = [op.kernels["triton"].source for op in ops().values() if "triton" in op.kernels]
    names = {path.partition(":")[0] for path in paths if path.startswith("mamba_ops.")}
    for name in names | {"mamba_ops.ops._triton.layout"}:
        importlib.import_module(name)
    own = (*names, "mamba_ops.ops._triton")
    return [m for n, m in sorted(sys.modules.items()) if any(n == name or n.startswith(f"{name}.") for name in own)]


def kernel_name(module: str, function: str) -> str:
    """Return the short name of a kernel: `op.function`, or of a shared module `module.function`."""
    return f"{op_of(module)}.{function}"


def _audit(module: ModuleType) -> Iterator[Finding]:
    from triton.runtime import Autotuner

    for name, found in vars(module).items():
        kernel, function = kernel_name(module.__name__, name), found
        while hasattr(function, "fn"):  # to the decorated function
            function = function.fn
        if function is found or not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        if isinstance(found, Autotuner):
            yield Finding(kernel, "", "is tuned on a call: choose its launch with tunable_launch instead")
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        assert isinstance(tree, ast.FunctionDef)
        read = _read(tree)
        for argument in inspect.signature(function).parameters:
            if argument not in read:
                stored = any(isinstance(n, ast.Name) and n.id == argument for n in ast.walk(tree))
                problem = "is overwritten before it is read" if stored else "is never read"
                yield Finding(kernel, argument, f"{problem}: leave it out")


def _read(function: ast.FunctionDef) -> set[str]:
    """Return the arguments that are read somewhere with the value that the caller passed."""
    read: set[str] = set()

    def loads(node: ast.AST | None, lost: set[str]) -> None:
        for inner in ast.walk(node) if node is not None else ():
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load) and inner.id not in lost:
                read.add(inner.id)

    def run(statements: list[ast.stmt], lost: set[str]) -> set[str] | None:
        """Go through statements; return what is overwritten after them, None where none follows."""
        for statement in statements:
            if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
                loads(statement.value, lost)
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for inner in [n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]:
                    if isinstance(inner.ctx, ast.Load) or isinstance(statement, ast.AugAssign):
                        loads(ast.Name(inner.id, ast.Load()), lost)
                    lost = lost | {inner.id}
            elif isinstance(statement, ast.If):
                loads(statement.test, lost)
                ends = [run(branch, lost) for branch in (statement.body, statement.orelse)]
                known = [end for end in ends if end is not None]
                if not known:
                    return None
                lost = set.intersection(*known)
            elif isinstance(statement, ast.For | ast.While):
                loads(statement.iter if isinstance(statement, ast.For) else statement.test, lost)
                run(statement.body, lost)  # it may run zero times, so what it overwrites counts as kept
            else:
                loads(statement, lost)
                if isinstance(statement, ast.Return):
                    return None
        return lost

    run(function.body, set())
    return read
