"""The code on our pages runs, prints what they say, and the table of environment variables is whole."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mamba_ops.commands import ops_page
from tests import fresh
from tests.pages import BLOCK, PAGES, ROOT, blocks, cells, program, write_files

COLD = ("README.md", "add_an_op.md", "cold_start.md")  # as a user's first program; and what compiles nothing


@pytest.mark.parametrize("page", [page for page in PAGES if program(page)], ids=lambda page: page.name)
def test_the_code_on_a_page_runs(page: Path, tmp_path: Path):
    write_files(page, tmp_path)
    printed = run(program(page), tmp_path / f"{page.stem}.py", is_warm=page.name not in COLD)
    if torch.accelerator.current_accelerator(check_available=True) is None:  # the pages show what a CPU prints
        for line, text in blocks(page, "output"):
            assert text in printed, f"{page.name}:{line}: the program printed:\n{printed}"


def test_the_cells_of_the_tutorial_run(tmp_path: Path):
    pytest.importorskip("transformers")
    code, outputs = cells(ROOT / "docs" / "tutorial.ipynb")
    printed = run(code, tmp_path / "tutorial.py", is_warm=True)
    assert len(outputs) == 8
    if torch.accelerator.current_accelerator(check_available=True) is None:
        rounding = re.compile(r"\b\de-0[5-9]\b")  # what is left of a difference depends on the processor
        assert rounding.sub("", printed) == rounding.sub("", "".join(outputs))


def test_the_site_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = {path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb")}
    assert "ops.md" in pages
    assert set(re.findall(r"[\w]+\.(?:md|ipynb)$", nav, re.MULTILINE)) == pages | {"index.md", "changelog.md"}


def run(code: str, script: Path, *, is_warm: bool) -> str:
    """Run a program in a process of its own and return what it prints; see `fresh.run`."""
    script.write_text(code, encoding="utf-8")
    # A RuntimeWarning is one of ours; torch has its own, that depend on the machine.
    done = fresh.run([*fresh.STRICT, script], cwd=script.parent, is_warm=is_warm)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_about_ops_says_what_the_registry_knows():
    made = ops_page.page()
    assert (ROOT / "docs" / "ops.md").read_text(encoding="utf-8") == made, "mamba-ops ops --markdown > docs/ops.md"
    assert "| none |" not in made.replace("| torch | any device | none |", "")  # every adapter says what it refuses


# -- docs/environment.md ----------------------------------------------------------------------------------------------

READERS = ("os.environ.get", "os.environ.pop", "os.environ.setdefault", "os.getenv")
COMPUTED = {"variable": "MAMBA_OPS_BACKEND", "switch": "MAMBA_OPS_NO_JIT", "check": "MAMBA_OPS_CHECK"}
# the registry's: named after a namespace
PYTHON = ("registry/**/*.py", "mamba_ops/**/*.py", "benchmarks/**/*.py", "examples/**/*.py", "tests/conftest.py")
SHELL = re.compile(r"\$\{([A-Z_]+):?-|^([A-Z_]+) *\?=", re.MULTILINE)  # ${NAME:-default}, NAME ?= default


def variables_in(tree: ast.AST) -> Iterator[str]:
    """Yield the names of the environment variables that a Python file reads or sets; computed ones by COMPUTED."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            name = node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in READERS:
            name = node.args[0]
        else:
            continue
        yield name.value if isinstance(name, ast.Constant) else COMPUTED[ast.unparse(name)]


def test_the_table_of_environment_variables_is_whole():
    read = {
        name
        for pattern in PYTHON
        for path in ROOT.glob(pattern)
        for name in variables_in(ast.parse(path.read_text(encoding="utf-8")))
    }
    for path in (ROOT / "Makefile", ROOT / "benchmarks" / "gpu_test.sh", ROOT / ".ci" / "run"):
        read |= {name for names in SHELL.findall(path.read_text(encoding="utf-8")) for name in names if name}
    rows = re.findall(
        r"^\| `([A-Z_]+)` \|", (ROOT / "docs" / "environment.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) == len(set(rows))
    assert set(rows) == read


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
