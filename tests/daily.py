"""What `make test` leaves to `make test-all`, so that it ends in time on two cores.

Of the tests in `FIRST_CASE` it runs the first case alone, of those in `NOT_DAILY` none. Each is named by file and
function, and is dear for what it adds to the others.
"""

from collections.abc import Iterable

import pytest

FIRST_CASE = (
    "tests/registry/test_private_names.py::test_without",
    "tests/test_backend_mamba_ssm.py::test_the_convolution",
    "tests/test_backend_mamba_ssm.py::test_the_selective_scan",
    "tests/test_backend_plugin.py::test_the_environment_selects_it",
    "tests/test_bad_input.py::test_gradients_are_refused_in_eager_and_compiled",
    "tests/test_check_op.py::test_a_fault_of_one_backend_is_its_own",
    "tests/test_check_op.py::test_a_planted_fault_is_found",
    "tests/test_cli.py::test_a_missing_extra_is_named",
)
NOT_DAILY = (
    "tests/audit/test_command.py::test_in_time_a_child_says_what_this_process_would_say",
    "tests/test_absent.py::test_sizes_seen_one_after_the_other_recompile_once",
    "tests/test_absent.py::test_the_guard_is_compiled_once_per_torch",
    "tests/test_absent.py::test_what_goes_wrong_in_the_child_is_told",
    "tests/test_absent.py::test_without_a_compiler_the_guard_is_borrowed",
    "tests/test_add_an_op.py::test_a_fault_in_its_kernel_fails_its_test",
    "tests/test_backend_plugin.py::test_its_kernel_is_right_where_it_does_not_refuse",
)


def mark(items: Iterable[pytest.Item]) -> None:
    """Mark as slow what is left out, of the tests that were collected."""
    seen = set[str]()
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in NOT_DAILY or (name in FIRST_CASE and name in seen):
            item.add_marker(pytest.mark.slow)
        seen.add(name)
