"""Reads the tree and holds it to docs/design.md: who may import what, what a file must have, how long it may be."""

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ("mamba_ops", "registry")
AROUND = ("benchmarks", "compile_tests", "examples", "tests")
MAX_LINES = 400
VENDORS = "triton flashinfer vllm_xpu_kernels"
IMITATED = "causal_conv1d fla mamba_ssm transformers vllm"

# Who may import what, beside itself and the standard library. A leading dot stands for mamba_ops, the dot alone for its
# public names; `.*` is all of it. The second column may be imported inside functions only: it is optional, or loads
# something that is.
MAY_IMPORT = {
    ".registry": ("torch typing_extensions", ""),
    ".ops": (".registry torch", ""),
    ".backends": (".ops .registry torch", f".kernels {VENDORS}"),
    ".kernels": ("torch triton", ""),
    ".layers": (".ops torch", ""),
    ".serving": (".layers .ops .registry torch", ""),
    ".compat": (".layers .ops .registry .serving torch", IMITATED),
    ".audit": (".absent .options .ops .registry .targets rich torch typer", ".cold_start .compat jinja2 triton"),
    ".absent": ("torch", ""),
    ".cold_start": (
        ".layers .options .registry .serving rich torch typer",
        ".compat .kernels .targets .warm_up transformers triton",
    ),
    ".compare": (".registry .targets torch", ".compat .demo"),
    ".targets": ("torch", ""),
    ".options": (".config .registry rich torch typer", ""),
    ".ops_page": (".registry", ""),
    ".config": (".ops .registry torch", ""),
    ".testing": (".audit .ops .registry pytest torch", ""),
    ".warm_up": (".cold_start .registry torch", ""),
    ".cli": (".* rich torch typer", ""),
    ".demo": (".* rich torch typer", ""),
    ".": (".backends .compare .config .layers .ops .registry .serving .warm_up torch", ""),
}


class Import(NamedTuple):
    name: str  # absolute and dotted, down to what is imported
    line: int
    deferred: bool  # stands inside a function


class Source(NamedTuple):
    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.module if self.path.name == "__init__.py" else self.module.rpartition(".")[0]


def parse(path: Path, module: str, text: str) -> Source:
    tree = ast.parse(text, str(path), feature_version=(3, 10))  # the oldest Python we promise
    return Source(path, module, text, tree)


@functools.cache
def sources(*folders: str) -> list[Source]:
    """Parse every file below the folders, each under the name that it is imported by."""
    found = []
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = f"mamba_ops.{name}" if path.is_relative_to(ROOT / "registry") else name
        found.append(parse(path.relative_to(ROOT), module, path.read_text(encoding="utf-8")))
    return found


def imports(node: ast.AST, package: str, deferred: bool = False) -> Iterator[Import]:
    deferred = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, deferred) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = importlib.util.resolve_name("." * child.level + (child.module or ""), package)
            yield from (Import(f"{base}.{alias.name}", child.lineno, deferred) for alias in child.names)
        else:
            yield from imports(child, package, deferred)


def word(name: str) -> str:
    """Return how the table spells the home of a module or of a name in one."""
    top, *rest = name.split(".")
    if top != "mamba_ops":
        return top
    return f".{rest[0]}" if rest and f".{rest[0]}" in MAY_IMPORT else "."


def forbidden_imports(source: Source) -> list[str]:
    """Return a sentence for each import that the table does not allow to this file."""
    mine = word(source.module)
    anywhere, in_functions = (set(column.split()) for column in MAY_IMPORT[mine])
    # A package may list its members, and a backend may have several files; apart from that backends never know each
    # other.
    own = set() if mine == ".backends" and source.module != "mamba_ops.backends" else {mine}
    family = ".".join([*source.module.split(".")[:3], ""])
    sentences = []
    for name, line, deferred in imports(source.tree, source.package):
        theirs = word(name)
        allowed = anywhere | own | (in_functions if deferred else set())
        if (".*" in allowed and theirs.startswith(".")) or (theirs == ".backends" and name.startswith(family)):
            continue
        if theirs not in allowed | sys.stdlib_module_names:
            where = "in a function" if deferred else "at the top"
            sentences.append(f"{source.path}:{line}: imports {name} {where}; {mine} may import {sorted(allowed)} there")
    return sentences


def declared_ops(source: Source) -> list[ast.FunctionDef]:
    """Return the functions under a `@namespace.op(...)`."""
    return [
        node
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute) and decorator.func.attr == "op"
    ]


def test_every_part_of_the_package_is_in_the_table():
    parts = {f".{name}" for source in sources(*PACKAGE) for name in source.module.split(".")[1:2]}
    assert parts <= MAY_IMPORT.keys()


def test_imports_follow_the_table():
    assert [sentence for source in sources(*PACKAGE) for sentence in forbidden_imports(source)] == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("mamba_ops.absent", "from mamba_ops.ops import selective_state_update"),
        ("mamba_ops.backends.triton", "import triton.language as tl"),
        ("mamba_ops.backends.triton", "from mamba_ops.kernels.triton import selective_state_update"),
        ("mamba_ops.backends.triton", "def adapter():\n    import transformers"),
        ("mamba_ops.backends.triton", "from .flashinfer import flashinfer"),
        ("mamba_ops.backends.triton", "from mamba_ops.backends import flashinfer"),
        ("mamba_ops.backends.flashinfer.mamba", "from mamba_ops.backends.triton import triton"),
        ("mamba_ops.backends.flashinfer.mamba", "from mamba_ops.backends import triton"),
        ("mamba_ops.compat.fla", "if True:\n    import fla"),
        ("mamba_ops.kernels.triton.scan", "from mamba_ops.registry import given"),
        ("mamba_ops.kernels.triton.scan", "def launch():\n    from ...ops import selective_scan"),
        ("mamba_ops.layers.mamba", "from mamba_ops import selective_scan"),
        ("mamba_ops.ops.scan", "from .. import backends"),
        ("mamba_ops.ops.scan", "import numpy"),
        ("mamba_ops.registry.op", "import mamba_ops.ops"),
        ("mamba_ops.registry.op", "import rich"),
    ],
)
def test_a_forbidden_import_is_found(module, text):
    assert len(forbidden_imports(parse(Path("planted.py"), module, text))) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            "mamba_ops.backends.triton",
            "def adapter():\n    from mamba_ops.kernels.triton.scan import scan\n    import triton",
        ),
        ("mamba_ops.backends.flashinfer.mamba", "from mamba_ops.backends.flashinfer.vendor import flashinfer"),
        ("mamba_ops.cli", "import typer\nfrom mamba_ops import audit, selective_scan, use_backend"),
        ("mamba_ops.kernels.triton.scan", "import triton\nfrom torch import Tensor\nfrom .softplus import softplus"),
        ("mamba_ops.ops.scan", "import math\nfrom ..registry import given\nfrom ._namespace import mamba"),
    ],
)
def test_an_allowed_import_is_let_through(module, text):
    assert forbidden_imports(parse(Path("planted.py"), module, text)) == []


def test_what_surrounds_the_package_uses_public_names():
    private = [
        f"{source.path}:{line}: imports {name}"
        for source in sources(*AROUND)
        for name, line, _ in imports(source.tree, source.package)
        if word(name).startswith(".") and any(part.startswith("_") and part[:2] != "__" for part in name.split("."))
    ]
    assert private == []


def test_the_oracle_shares_no_code_with_the_package():
    shared = [
        f"{source.path}:{line}: imports {name}"
        for source in sources("tests/oracle")
        for name, line, _ in imports(source.tree, source.package)
        if word(name).startswith(".")
    ]
    assert shared == []


def test_every_module_and_every_op_says_what_it_is_for():
    silent = [str(source.path) for source in sources(*PACKAGE) if source.text and not ast.get_docstring(source.tree)]
    silent += [
        f"{source.path}:{op.lineno}: {op.name}"
        for source in sources(*PACKAGE)
        for op in declared_ops(source)
        if not ast.get_docstring(op)
    ]
    assert silent == []


def test_no_file_that_declares_ops_hides_its_annotations():
    # Under `from __future__ import annotations` torch's infer_schema sees strings for types.
    hidden = [
        f"{source.path}:{line}"
        for source in sources(*PACKAGE, *AROUND)
        if word(source.module) == ".ops" or declared_ops(source)
        for name, line, _ in imports(source.tree, source.package)
        if name == "__future__.annotations"
    ]
    assert hidden == []


def test_no_file_is_too_long():
    lengths = {
        str(source.path): len(source.text.splitlines())
        for source in sources(*PACKAGE, *AROUND)
        if word(source.module) != ".kernels"
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_file_names_a_vendors_device_but_where_that_is_its_business():
    # cli, audit/cli: what --device takes; absent: the devices that it imitates; backends: their records.
    records = ("backends/flashinfer/vendor.py", "backends/triton.py")
    allowed = {f"mamba_ops/{name}" for name in ("absent.py", "audit/cli.py", "cli.py", "serving/capture.py", *records)}
    named = [
        f"{source.path}:{node.lineno}"
        for source in sources(*PACKAGE)
        if str(source.path) not in allowed
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Constant) and str(node.value).partition(":")[0] == "cuda")
        or (isinstance(node, ast.Attribute) and node.attr == "cuda")
    ]
    assert named == []
