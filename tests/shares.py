"""Which tests of a parallel run (`-n 2 --dist loadgroup`) share a process, and in what order processes get them.

All tests of a file do: what a file makes once, or a process remembers, is made once then. (The marker `xdist_group`
would not do: pytest-xdist 3.8 writes groups into a name that pytest 9.2 does not read.)
"""

from collections import Counter
from typing import Any

import pytest

TOGETHER = {
    "deep": ("tests/audit/test_browser.py", "tests/audit/test_report.py"),  # a report of many findings
    "packaging": (  # the wheel
        "tests/test_backend_mamba_ssm.py",
        "tests/test_backend_plugin.py",
        "tests/test_packaging.py",
        "tests/test_vllm_plugin.py",
    ),
    "programs": (  # a process that has compiled, for `tests.fresh`
        "tests/test_docs.py",
        "tests/test_examples.py",
        "tests/test_add_an_op.py",
    ),
}
"""Files whose tests share a process, and what they share in it."""
FIRST = (
    *TOGETHER["programs"],
    "tests/training/test_compiled.py",
    "compile_tests/test_absent.py",
    "tests/test_absent.py",
    "tests/test_fitting.py",
    "tests/test_mps.py",
    "tests/test_layers_mamba3_mimo.py",
    "tests/test_layers_mamba3.py",
    "tests/test_private_triton.py",
    "tests/test_other_systems.py",
    "tests/test_compat_install_transformers.py",
    "tests/registry/test_private_names.py",
    "compile_tests/test_generated.py",
    "compile_tests/test_splitting.py",
    "compile_tests/test_plans.py",
    "tests/audit/test_fixture.py",
    "tests/audit/test_fronts.py",
    "tests/test_rehearsal.py",
    "tests/test_warm_up_transformers.py",
)
"""Files of few tests that take long, so that no process is left alone with them at the end."""
_SHARES = {path: share for share, paths in TOGETHER.items() for path in paths}


def share_of(nodeid: str) -> str:
    """Return what stands for a test's process: its file, or the files that it belongs to."""
    path = nodeid.partition("::")[0]
    return _SHARES.get(path, path)


def sort(items: list[pytest.Item]) -> None:
    """Put long files of few tests first, then the files by their number of tests."""
    sizes = Counter(share_of(item.nodeid) for item in items)

    def place(item: pytest.Item) -> tuple[int, int]:
        path = item.nodeid.partition("::")[0]
        return (FIRST.index(path), 0) if path in FIRST else (len(FIRST), -sizes[share_of(item.nodeid)])

    items.sort(key=place)


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Return what gives each process the tests of whole shares, in the order in which they were collected."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Shares(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return share_of(nodeid)

    config.option.loadscopereorder = False
    return Shares(config, log)
