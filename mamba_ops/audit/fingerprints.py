"""Names of findings that stay the same where code is moved within its file, or formatted in another way."""

import ast
import functools
import hashlib
import linecache
import re
from pathlib import Path

from mamba_ops.audit.source_locations import SourceLocation

_HEADERS = {  # of a statement that holds others, the part on its own lines
    ast.If: ("test",),
    ast.While: ("test",),
    ast.For: ("target", "iter"),
    ast.AsyncFor: ("target", "iter"),
    ast.With: ("items",),
    ast.AsyncWith: ("items",),
    ast.Try: (),
    ast.Match: ("subject",),
    ast.FunctionDef: ("args",),
    ast.AsyncFunctionDef: ("args",),
    ast.ClassDef: ("bases",),
}


def fingerprint(kind: str, cause: str, op: str, where: SourceLocation | None) -> str:
    """Return 16 hexadecimal digits: of what was found, and of the file's name, the function and the statement."""
    facts = [kind, cause, re.sub(r" after line \d+", "", op)]
    if where is not None:
        facts += [Path(where.file).name, where.function, statement(where)]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def statement(where: SourceLocation) -> str:
    """Return the statement at a line in a form of its own: without comments, line breaks and kinds of quotes.

    Of a statement that holds others, such as `if`, that is its first lines. Where the file cannot be parsed, the line
    without its spaces.
    """
    linecache.checkcache(where.file)  # the file may have been written since it was read
    lines = linecache.getlines(where.file)
    found = _innermost(_parsed("".join(lines)), where.line) if lines else None
    if found is None:
        return re.sub(r"\s+", "", where.source)
    parts = _HEADERS.get(type(found))
    if parts is None:
        return ast.unparse(found)
    values = [getattr(found, part) for part in parts]
    nodes = [node for value in values for node in (value if isinstance(value, list) else [value])]
    return " ".join([type(found).__name__, getattr(found, "name", ""), *map(ast.unparse, nodes)])


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _innermost(tree: ast.AST | None, line: int) -> ast.stmt | None:
    found = None
    for node in ast.walk(tree) if tree is not None else ():  # breadth first: what comes later is further inside
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno):
            found = node
    return found
