"""A parallel run gives the tests of a file, or of files that belong together, to one process."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest, shares

ROOT = Path(__file__).parents[1]
CONFTEST = """
import os, pathlib, pytest
from tests import shares

def pytest_xdist_make_scheduler(config, log):
    return shares.scheduler(config, log)

def pytest_runtest_setup(item):
    with pathlib.Path("seen").open("a") as seen:
        seen.write(f"{item.path.name} {os.getpid()}\\n")
"""
TESTS = "import pytest, time\n@pytest.mark.parametrize('n', range(5))\ndef test(n): time.sleep(0.01)\n"


def test_every_file_that_is_named_is_there() -> None:
    named = {path for paths in shares.TOGETHER.values() for path in paths} | {*shares.FIRST}
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []


def test_what_takes_long_comes_first_and_then_large_files() -> None:
    first, last = shares.FIRST[0], shares.FIRST[-1]
    names = ["tests/a.py::x", "tests/b.py::x", "tests/b.py::y[p::q]", f"{last}::x", f"{first}::x"]
    items: list[Any] = [SimpleNamespace(nodeid=name) for name in names]
    shares.sort(items)
    assert [item.nodeid for item in items] == [names[4], names[3], names[1], names[2], names[0]]


def test_make_test_shares_out_so() -> None:
    """As `make test` runs pytest, and no other way of it."""
    pytest.importorskip("xdist")
    options = {"dist": "loadgroup", "tx": ["2*popen"]}
    config: Any = SimpleNamespace(getvalue=options.__getitem__, option=SimpleNamespace())
    scheduler = conftest.pytest_xdist_make_scheduler(config, None)
    assert scheduler._split_scope("tests/a.py::x[p::q]") == "tests/a.py"
    for share, paths in shares.TOGETHER.items():
        assert {scheduler._split_scope(f"{path}::x") for path in paths} == {share}
    assert "--dist loadgroup" in (ROOT / "Makefile").read_text()
    options["dist"] = "load"
    assert conftest.pytest_xdist_make_scheduler(config, None) is None


def test_a_file_stays_in_one_process(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name in ("test_a.py", "test_b.py", "test_c.py"):
        (tmp_path / name).write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = (tmp_path / "seen").read_text().splitlines()
    assert len(seen) == 15
    assert len(set(seen)) == 3  # of a file and a process
    assert len({line.split()[1] for line in seen}) == 2
