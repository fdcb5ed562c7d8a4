"""Holds the tree to docs/design.md: what a file must have, how long it may be, where optional packages are imported.

Who may import which part of the package is for import-linter, whose contracts are in pyproject.toml; here it is shown
that they are kept, and that each of them is broken by the import that it forbids.
"""

import ast
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import daily

ROOT = Path(__file__).parents[1]
PACKAGE = ("mamba_ops", "registry")
AROUND = ("benchmarks", "compile_tests", "examples", "tests")
MAX_LINES = 400

# Third-party packages. What is optional, or takes a moment to load, is imported inside functions alone; except here,
# where nothing works without it. A module is loaded only when it is asked for then.
NEEDED = {"torch", "typing_extensions"}
OPTIONAL = {"flashinfer", "jinja2", "matplotlib", "packaging", "pytest", "rich", "transformers", "triton", "typer"}
AT_THE_TOP = {
    "mamba_ops/commands/*": {"rich", "typer"},
    "mamba_ops/ops/*/triton.py": {"triton"},
    "mamba_ops/ops/*/triton/*": {"triton"},
    "mamba_ops/ops/_triton/*": {"triton"},
    "mamba_ops/testing/__init__.py": {"pytest"},
}


class Import(NamedTuple):
    name: str  # absolute and dotted, down to what is imported
    line: int
    deferred: bool  # stands inside a function, or is for type checkers alone


class Source(NamedTuple):
    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.module if self.path.name == "__init__.py" else self.module.rpartition(".")[0]


def parse(path: Path, text: str) -> Source:
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    tree = ast.parse(text, str(path), feature_version=(3, 10))  # the oldest Python we promise
    return Source(path, f"mamba_ops.{name}" if path.parts[0] == "registry" else name, text, tree)


@functools.cache
def sources(*folders: str) -> list[Source]:
    """Parse every file below the folders, each under the name that it is imported by."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert paths, folders
    return [parse(path.relative_to(ROOT), path.read_text(encoding="utf-8")) for path in paths]


def imports(node: ast.AST, package: str, deferred: bool = False) -> Iterator[Import]:
    deferred = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    deferred = deferred or (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING")
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, deferred) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = importlib.util.resolve_name("." * child.level + (child.module or ""), package)
            yield from (Import(f"{base}.{alias.name}", child.lineno, deferred) for alias in child.names)
        else:
            yield from imports(child, package, deferred)


@functools.cache
def imports_of(source: Source) -> list[Import]:
    return list(imports(source.tree, source.package))


def is_ours(name: str) -> bool:
    return name.partition(".")[0] == "mamba_ops"


def declared_ops(source: Source) -> list[ast.FunctionDef]:
    """Return the functions under a `@namespace.op(...)`."""
    return [
        node
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute) and decorator.func.attr == "op"
    ]


# -- the contracts of import-linter -----------------------------------------------------------------------------------


def lint_imports(folder: Path) -> str:
    """Return what import-linter says of the package in a folder."""
    pytest.importorskip("importlinter", reason="the contracts are import-linter's")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = (sys.executable, "-c", code, "--no-cache")
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def copied_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, in which imports can be planted."""
    folder = tmp_path_factory.mktemp("planted")
    for name in PACKAGE:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_every_contract_is_kept():
    output = lint_imports(ROOT)
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", output), output


@pytest.mark.parametrize(
    ("contract", "file", "text"),
    [
        ("Each part", "registry/errors.py", "import mamba_ops.ops"),
        ("Each part", "mamba_ops/ops/selective_scan/op.py", "from mamba_ops import layers"),
        ("Each part", "mamba_ops/ops/selective_scan/op.py", "from ... import config"),
        ("Each part", "mamba_ops/layers/mamba.py", "def run():\n    from mamba_ops.serving import Plan"),
        ("Each part", "mamba_ops/serving/plan.py", "from mamba_ops.cold_start import arguments"),
        ("Each part", "mamba_ops/another_part.py", "import torch"),
        ("Nothing imports the commands", "mamba_ops/audit/run.py", "from mamba_ops.commands import options"),
        (
            "Nothing imports the commands",
            "mamba_ops/testing/judge.py",
            "from mamba_ops.commands import targets",
        ),
        ("The package does not import itself", "mamba_ops/layers/mamba.py", "from mamba_ops import selective_scan"),
        ("Backends do not know", "mamba_ops/backends/triton.py", "from .flashinfer import flashinfer"),
        ("Triton kernels import torch", "mamba_ops/ops/selective_scan/triton.py", "from .op import Arguments"),
        ("Triton kernels import torch", "mamba_ops/ops/_triton/common.py", "from mamba_ops.registry import Op"),
        (
            "No op uses another's Triton",
            "mamba_ops/ops/selective_scan/triton.py",
            "from mamba_ops.ops.causal_conv1d.triton import causal_conv1d",
        ),
        ("Triton kernels are named by", "mamba_ops/ops/selective_scan/op.py", "from .triton import selective_scan"),
        ("What Triton kernels share", "mamba_ops/layers/mamba.py", "from mamba_ops.ops._triton import layout"),
    ],
)
def test_a_contract_is_broken_by_the_import_that_it_forbids(copied_tree: Path, contract: str, file: str, text: str):
    path = copied_tree / file
    before = path.read_text(encoding="utf-8") if path.exists() else None
    path.write_text(f"{before or ''}\n{text}\n", encoding="utf-8")
    try:
        output = lint_imports(copied_tree)
    finally:
        path.unlink() if before is None else path.write_text(before, encoding="utf-8")
    assert re.search(rf"^{contract}.* BROKEN", output, re.MULTILINE), output


# -- third-party packages ---------------------------------------------------------------------------------------------


def misplaced_imports(source: Source) -> list[str]:
    """Return a sentence for each import of a third-party package that is not allowed where it stands."""
    here = [names for pattern, names in AT_THE_TOP.items() if fnmatch(source.path.as_posix(), pattern)]
    at_the_top = NEEDED.union(*here)
    sentences = []
    for name, line, deferred in imports_of(source):
        top = name.partition(".")[0]
        allowed = at_the_top | OPTIONAL if deferred else at_the_top
        if top not in allowed | sys.stdlib_module_names | {"mamba_ops"}:
            where = "in a function" if deferred else "at the top"
            sentences.append(f"{source.path}:{line}: imports {name} {where}; there it may import {sorted(allowed)}")
    return sentences


def test_what_is_optional_is_imported_inside_functions():
    assert [sentence for source in sources(*PACKAGE) for sentence in misplaced_imports(source)] == []


@pytest.mark.parametrize(
    ("path", "text", "count"),
    [
        ("registry/op.py", "import rich", 1),
        ("mamba_ops/layers/mamba.py", "if True:\n    import triton", 1),
        ("mamba_ops/ops/selective_scan/flashinfer.py", "import flashinfer", 1),
        ("mamba_ops/ops/selective_scan/op.py", "def run():\n    import numpy", 1),
        ("mamba_ops/ops/selective_scan/flashinfer.py", "def run():\n    import flashinfer", 0),
        ("mamba_ops/ops/selective_scan/triton/forward.py", "import math\nimport triton.language as tl", 0),
        ("mamba_ops/commands/cli.py", "import typer\nfrom mamba_ops import audit", 0),
    ],
)
def test_a_misplaced_import_is_found_and_another_is_not(path: str, text: str, count: int):
    assert len(misplaced_imports(parse(Path(path), text))) == count


# -- what surrounds the package ---------------------------------------------------------------------------------------


def test_what_surrounds_the_package_uses_public_names():
    """Tests of what ops share, or of the registry's inside, may name those modules, but no private name in them."""
    shared = {"mamba_ops.audit._torch", "mamba_ops.ops._common", "mamba_ops.ops._triton"}
    shared |= {"mamba_ops.ops._cpp", "mamba_ops.registry._torch"}
    modules = {"_triton"}  # below those
    private = []
    for source in sources(*AROUND):
        tested = "tests" in source.path.parts[0]
        for name, line, _ in imports_of(source):
            beyond = name.split(".")[3:] if tested and ".".join(name.split(".")[:3]) in shared else name.split(".")
            if is_ours(name) and any(
                part.startswith("_") and part[:2] != "__" for part in beyond if part not in modules
            ):
                private.append(f"{source.path}:{line}: imports {name}")
    assert private == []


def test_the_oracles_share_no_code_with_the_package():
    oracles = [s for s in sources("tests/ops") if s.path.name == "oracle.py" or s.path.parent.name == "common"]
    assert len(oracles) >= len(list((ROOT / "mamba_ops" / "ops").glob("*/op.py")))
    shared = [
        f"{source.path}:{line}: imports {name}"
        for source in oracles
        for name, line, _ in imports_of(source)
        if is_ours(name)
    ]
    assert shared == []


def test_the_tests_that_are_not_for_every_day_are_there():
    names = (*daily.ONE_CASE_IN_FOUR, *daily.ONE_CASE_IN_EIGHT, *daily.FIRST_CASE, *daily.NOT_DAILY)
    assert len(set(names)) == len(names)
    for name in names:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), name


# -- every file -------------------------------------------------------------------------------------------------------


def test_every_module_and_every_op_says_what_it_is_for():
    silent = [str(source.path) for source in sources(*PACKAGE) if source.text and not ast.get_docstring(source.tree)]
    ops = [(source, op) for source in sources(*PACKAGE) for op in declared_ops(source)]
    assert ops
    silent += [f"{source.path}:{op.lineno}: {op.name}" for source, op in ops if not ast.get_docstring(op)]
    assert silent == []


def test_no_file_that_declares_ops_hides_its_annotations():
    # Under `from __future__ import annotations` torch's infer_schema sees strings for types.
    hidden = [
        f"{source.path}:{line}"
        for source in sources(*PACKAGE, *AROUND)
        if source.path.parts[:2] == ("mamba_ops", "ops") or declared_ops(source)
        for name, line, _ in imports_of(source)
        if name == "__future__.annotations"
    ]
    assert hidden == []


def test_no_file_is_too_long():
    lengths = {str(source.path): len(source.text.splitlines()) for source in sources(*PACKAGE, *AROUND)}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_file_names_a_vendors_device_but_where_that_is_its_business():
    allowed = (
        "mamba_ops/audit/absent.py",  # the devices that it imitates
        "mamba_ops/audit/answers.py",  # what they say of themselves
        "mamba_ops/backends/",  # their records
        "mamba_ops/cold_start/targets.py",  # the GPUs that kernels are compiled for without one
        "mamba_ops/commands/doctor/facts.py",  # what torch was built for
        "mamba_ops/ops/_triton/_triton.py",  # Triton's names of its targets
        "mamba_ops/ops/_triton/states.py",  # instructions that NVIDIA's GPUs alone have
        "mamba_ops/serving/capture.py",
    )
    named = [
        f"{source.path}:{node.lineno}"
        for source in sources(*PACKAGE)
        if not source.path.as_posix().startswith(allowed)
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Constant) and str(node.value).partition(":")[0] == "cuda")
        or (isinstance(node, ast.Attribute) and node.attr == "cuda")
    ]
    assert named == []
