"""Reads the expression that an instruction belongs to, by the columns that Python 3.11 and later keep of it."""

import ast
import functools
from pathlib import Path

from mamba_ops.audit.source_locations import Frame


def called_at(frame: Frame | None) -> str | None:
    """Return the function that a frame calls, as it is written there: "y.clamp"; None where that is not known."""
    end = getattr(frame, "end_colno", None)
    if frame is None or frame.lineno is None or end is None:
        return None
    line, start = frame.lineno, getattr(frame, "colno", None)
    calls = [
        node
        for node in _calls(frame.filename)
        if node.end_col_offset == end and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    if not calls:
        return None
    exact = [node for node in calls if (node.lineno, node.col_offset) == (line, start)]
    innermost = min(exact or calls, key=lambda node: ((node.end_lineno or 0) - node.lineno, -node.col_offset))
    return ast.unparse(innermost.func)


@functools.lru_cache(maxsize=64)
def _calls(file: str) -> list[ast.Call]:
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
