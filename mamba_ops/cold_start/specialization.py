"""What makes Triton compile a kernel again, read off its source: arguments that nobody reads, and numbers and addresses
that change from call to call and that Triton would compile for.

Triton compiles a kernel anew for every value of a `constexpr`; for a number that is 1, a multiple of 16 or neither; for
an address that is a multiple of 16, or not. So all that varies must be an argument that it does not look at.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from mamba_ops.registry import ops

Function = ast.FunctionDef
_VARIES = re.compile(
    r"(^|_)(batch|(n|num|max)?_?(tokens?|rows|requests|sequences|seqs|slots|chunks)|length|lengths|seqlens?|stride)($|_)"
)
"""Names of what varies from call to call."""
_TILE = re.compile(r"^BLOCK|_BLOCK$|^PER_|_PER_")


class Finding(NamedTuple):
    """A defect: an argument of a kernel that can make it compile again, or does nothing else."""

    kernel: str
    """`module.function`, in Triton's words the kernel's own name."""
    argument: str
    problem: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.argument} {self.problem}"


def audit_sources(*modules: ModuleType) -> list[Finding]:
    """Return the defects of all Triton kernels in these modules, read off their sources.

    An argument is a defect if it is never read, or is overwritten before it is read; if it has the name of something
    that varies (tokens, rows, slots, a stride) and is a constexpr or an autotune key; and if it is a number that Triton
    compiles for because it is 1 or a multiple of 16, or an address because it is one. Memory that the launcher itself
    allocates does not vary, nor do the arguments that a module names in `STAY`: parameters. Nothing is compiled or run,
    and no GPU is needed.
    """
    return [finding for module in modules for finding in _audit(module)]


def our_modules() -> list[ModuleType]:
    """Import and return the modules that hold the Triton kernels of all ops, and what these share."""
    paths = [op.kernels["triton"].source for op in ops().values() if "triton" in op.kernels]
    names = {path.partition(":")[0] for path in paths if path.startswith("mamba_ops.")}
    return [importlib.import_module(name) for name in sorted({"mamba_ops.ops._triton.layout", *names})]


def _audit(module: ModuleType) -> Iterator[Finding]:
    path = inspect.getsourcefile(module)
    tree = ast.parse(Path(path or "").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    compiled = {function.name: function for function in functions if _decorator(function, "jit") is not None}
    launches = _launches(functions)
    for function in compiled.values():
        name = f"{module.__name__}.{function.name}"
        names = [a.arg for a in _arguments(function)]
        read = _read(function)
        for argument in names:
            if argument not in read:
                stored = any(isinstance(n, ast.Name) and n.id == argument for n in ast.walk(function))
                problem = "is overwritten before it is read" if stored else "is never read"
                yield Finding(name, argument, f"{problem}: leave it out")
        if function.name in launches or _keyword(function, "do_not_specialize", module):
            own = launches.get(function.name, _Launch(frozenset(), frozenset()))
            yield from (Finding(name, a, p) for a, p in _specialized(function, module, own))


def _specialized(function: Function, module: ModuleType, launch: "_Launch") -> Iterator[tuple[str, str]]:
    """The arguments of a launched kernel that it is compiled anew for, though they vary."""
    free = _keyword(function, "do_not_specialize", module)
    unaligned = _keyword(function, "do_not_specialize_on_alignment", module)
    keys = _keyword(function, "key", module, decorator="autotune")
    for number, argument in enumerate(_arguments(function)):
        name = argument.arg
        if name in keys and _varies(name):
            yield name, "is an autotune key and varies from call to call: tune for static sizes alone"
        if argument.annotation is not None and "constexpr" in ast.unparse(argument.annotation):
            if _varies(name):
                yield name, "is a constexpr and varies from call to call: make it an argument, in do_not_specialize"
        elif {name, number} & free or name in launch.allocated or name in getattr(module, "STAY", ()):
            continue
        elif name in launch.numbers:
            yield name, "is a number that Triton compiles for (1, multiples of 16): name it in do_not_specialize"
        elif not {name, number} & unaligned:
            advice = "name a number in do_not_specialize, an address in do_not_specialize_on_alignment"
            yield name, f"is compiled for by its value or alignment: {advice}"


def _varies(name: str) -> bool:
    return not _TILE.search(name) and _VARIES.search(name.lower()) is not None


# -- decorators and launches ------------------------------------------------------------------------------------------


def _decorator(function: Function, name: str) -> ast.expr | None:
    """The decorator `name`, `triton.name`, or a call of either."""
    for decorator in function.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if ast.unparse(called).rpartition(".")[2] == name:
            return decorator
    return None


def _keyword(function: Function, name: str, module: ModuleType, decorator: str = "jit") -> set[str | int]:
    """The value of a decorator's keyword, names of arguments or their numbers, computed among the module's names."""
    found = _decorator(function, decorator)
    for keyword in found.keywords if isinstance(found, ast.Call) else ():
        if keyword.arg == name:
            return set(eval(compile(ast.Expression(keyword.value), module.__name__, "eval"), vars(module)))
    return set()


class _Launch(NamedTuple):
    allocated: frozenset[str]
    """Arguments that the launcher allocates: they begin at multiples of 16 bytes at every call."""
    numbers: frozenset[str]
    """Arguments that are surely numbers: constants, sizes and strides."""


def _launches(functions: list[Function]) -> dict[str, _Launch]:
    """Every `kernel[grid](...)` in the functions, by the kernel's name."""
    kernels = {function.name: function for function in functions}
    found: dict[str, _Launch] = {}
    for launcher in functions:
        made = _assigned(launcher)
        for call in ast.walk(launcher):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript)):
                continue
            if not (isinstance(called := call.func.value, ast.Name) and called.id in kernels):
                continue
            names = [a.arg for a in _arguments(kernels[called.id])]
            starred = [isinstance(a, ast.Starred) for a in call.args]
            placed = call.args[: starred.index(True)] if any(starred) else call.args  # past a star places are unknown
            given = [*zip(names, placed, strict=False), *((k.arg, k.value) for k in call.keywords if k.arg)]
            before = found.get(called.id, _Launch(frozenset(), frozenset()))
            found[called.id] = _Launch(
                before.allocated | {n for n, value in given if _all(value, made, _allocates)},
                before.numbers | {n for n, value in given if _all(value, made, _is_number)},
            )
    return found


def _assigned(launcher: Function) -> dict[str, list[ast.expr]]:
    """Every plain value that a launcher gives to a name, None apart."""
    values: dict[str, list[ast.expr]] = {}
    for node in ast.walk(launcher):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and not _is_none(node.value):
                    values.setdefault(target.id, []).append(node.value)
    return values


def _all(value: ast.expr, made: dict[str, list[ast.expr]], holds: Callable[[ast.expr], bool]) -> bool:
    """Whether something holds of a value, or of all values that a name is given."""
    values = made.get(value.id, []) if isinstance(value, ast.Name) else [value]
    return bool(values) and all(map(holds, values))


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _allocates(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and "empty" in ast.unparse(value.func).rpartition(".")[2]


def _is_number(value: ast.expr) -> bool:
    if isinstance(value, ast.IfExp):
        return all(_is_none(v) or _is_number(v) for v in (value.body, value.orelse))
    if isinstance(value, ast.Constant):
        return isinstance(value.value, int)
    return re.search(r"\.(stride\([^()]*\)|shape\[[^][]*\]|numel\(\))$", ast.unparse(value)) is not None


# -- what is read -----------------------------------------------------------------------------------------------------


def _arguments(function: Function) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def _read(function: Function) -> set[str]:
    """The names whose value at the function's beginning is read somewhere."""
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
                run(statement.body, lost)  # perhaps never: what it overwrites is not lost
            else:
                loads(statement, lost)
                if isinstance(statement, ast.Return):
                    return None
        return lost

    run(function.body, set())
    return read
