"""Functions without the statements that keep Dynamo from going on after a break: `try`, `with` and `yield` around it.

After a break Dynamo compiles the rest of a function as one of its own. Out of the middle of such a statement it cannot,
and gives the whole function up. So the audit looks behind the break with the statement taken apart: the body of a `try`
runs as if nothing were raised, that of a `with` as if nothing were entered, and a generator returns a list. Lines keep
their numbers.
"""

import ast
import contextlib
import gc
import inspect
import linecache
import types
from collections.abc import Iterable, Sequence
from typing import Any

from mamba_ops.audit.source_locations import SourceLocation

Place = tuple[str, str, int]  # a file, a function and a line
_YIELDED = "_mamba_ops_yielded"


def places_of(stack: Iterable[SourceLocation]) -> set[Place]:
    """Return the lines of a stack, each with its function."""
    return {(location.file, location.function, location.line) for location in stack}


def take_apart(stack: contextlib.ExitStack, places: set[Place]) -> bool:
    """Until the stack closes, functions run without such statements around these lines; False if there are none."""
    wanted: dict[tuple[str, str], list[int]] = {}
    for file, name, line in places:
        wanted.setdefault((file, name), []).append(line)
    changed: dict[int, types.CodeType | None] = {}  # by identity: code of Dynamo's cannot be hashed
    for function in _functions():
        code = function.__code__
        lines = wanted.get((code.co_filename, code.co_name))
        if lines is None:
            continue
        if id(code) not in changed:
            changed[id(code)] = _without(code, lines)
        if (other := changed[id(code)]) is not None:
            stack.callback(setattr, function, "__code__", code)
            function.__code__ = other
    return any(changed.values())


def _functions() -> list[types.FunctionType]:
    """Return all that there are. What is frozen, as servers do before they fork, is not listed: it thaws meanwhile."""
    if is_frozen := gc.get_freeze_count() > 0:
        gc.unfreeze()
    try:
        return [found for found in gc.get_objects() if type(found) is types.FunctionType]
    finally:
        if is_frozen:
            gc.collect()  # or garbage would stay
            gc.freeze()


def _without(code: types.CodeType, lines: Sequence[int]) -> types.CodeType | None:
    """Return the code of a function without those statements, or None if there are none, or it cannot be made."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        tree = ast.parse("".join(linecache.getlines(code.co_filename)))
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        found = next((node for node in ast.walk(tree) if _defines(node, code)), None)
        if not isinstance(found, ast.FunctionDef):
            return None
        shape = ast.dump(found)
        makes_list = code.co_flags & inspect.CO_GENERATOR and _is_plain_generator(found)
        apart = _TakeApart(found, lines, makes_list=bool(makes_list))
        found.body = apart.body()
        if ast.dump(found) == shape:
            return None
        found.decorator_list = []
        around: ast.stmt = found
        if isinstance(owner := parents[found], ast.ClassDef):  # for private names and super()
            around = ast.ClassDef(owner.name, [], [], [found], [], **_no_type_parameters(owner))
        free = [name for name in code.co_freevars if name != "__class__"]
        outer = ast.parse(f"def outer({', '.join(free)}): pass")
        outer.body[0].body = [around]  # type: ignore[attr-defined]
        made = compile(ast.fix_missing_locations(outer), code.co_filename, "exec", dont_inherit=True)
        new = next((one for one in _codes(made) if one.co_name == code.co_name), None)
        if new is not None and new.co_freevars == code.co_freevars:
            return new
    return None


def _no_type_parameters(node: ast.ClassDef) -> dict[str, Any]:
    return {"type_params": []} if "type_params" in node._fields else {}  # Python 3.12


def _defines(node: ast.AST, code: types.CodeType) -> bool:
    if not isinstance(node, ast.FunctionDef) or node.name != code.co_name:
        return False
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return code.co_firstlineno in (first, node.lineno)


def _codes(code: types.CodeType) -> Iterable[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _is_plain_generator(node: ast.FunctionDef) -> bool:
    """Whether a generator only hands out values, so that a list of them does."""
    if node.decorator_list:  # such as contextmanager, which asks for one value
        return False
    yields = [one for one in ast.walk(node) if isinstance(one, (ast.Yield, ast.YieldFrom))]
    plain = [one.value for one in ast.walk(node) if isinstance(one, ast.Expr)]
    return all(one in plain for one in yields)


class _TakeApart(ast.NodeTransformer):
    def __init__(self, function: ast.FunctionDef, lines: Sequence[int], *, makes_list: bool) -> None:
        self.function, self.lines, self.makes_list = function, lines, makes_list

    def body(self) -> list[ast.stmt]:
        """Return the function's statements, taken apart."""
        holder = ast.Module(self.function.body, [])
        self.generic_visit(holder)
        if not self.makes_list:
            return holder.body
        begin = ast.parse(f"{_YIELDED} = []").body
        end = ast.parse(f"return {_YIELDED}").body
        for one in begin:
            _move(one, self.function.lineno)
        for one in end:
            _move(one, self.function.end_lineno or self.function.lineno)
        return [*begin, *holder.body, *end]

    def _is_around(self, node: ast.stmt) -> bool:
        return any(node.lineno <= line <= (node.end_lineno or node.lineno) for line in self.lines)

    def visit_Try(self, node: ast.Try) -> Any:
        self.generic_visit(node)
        return [*node.body, *node.orelse, *node.finalbody] if self._is_around(node) else node

    def visit_With(self, node: ast.With) -> Any:
        self.generic_visit(node)
        kept = [item for item in node.items if item.optional_vars is not None or _is_of_torch(item.context_expr)]
        if not self._is_around(node) or len(kept) == len(node.items):
            return node
        return ast.copy_location(ast.With(kept, node.body), node) if kept else node.body

    def visit_Expr(self, node: ast.Expr) -> Any:
        if not self.makes_list or not isinstance(node.value, (ast.Yield, ast.YieldFrom)):
            return node
        how = "extend" if isinstance(node.value, ast.YieldFrom) else "append"
        call = ast.parse(f"{_YIELDED}.{how}(None)").body[0]
        call.value.args = [node.value.value or ast.Constant(None)]  # type: ignore[attr-defined]
        _move(call, node.lineno, keep=node.value.value)
        return call

    def visit_Return(self, node: ast.Return) -> Any:
        if self.makes_list:
            node.value = ast.copy_location(ast.Name(_YIELDED, ast.Load()), node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        return node  # another function

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> Any:
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        return node

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        return node


def _is_of_torch(node: ast.expr) -> bool:
    """Whether an expression is of torch, such as `torch.no_grad()`, which Dynamo enters again after a break."""
    return any(isinstance(one, ast.Name) and one.id == "torch" for one in ast.walk(node))


def _move(node: ast.AST, line: int, keep: ast.AST | None = None) -> None:
    """Give the nodes that were made the number of a line."""
    kept = set(ast.walk(keep)) if keep is not None else set()
    for one in ast.walk(node):
        if one not in kept and "lineno" in one._attributes:
            one.lineno = one.end_lineno = line  # type: ignore[attr-defined]
            one.col_offset = one.end_col_offset = 0  # type: ignore[attr-defined]
