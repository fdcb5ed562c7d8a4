"""How differences get from these tests to docs/export.md: as properties, for `--junit-xml`."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.export.programs import Program

Measure = Callable[[Program, Any], float]


@pytest.fixture
def measure(record_property: Callable[[str, object], None]) -> Measure:
    """The largest difference of a program that runs elsewhere to eager calls; it is recorded."""

    def difference(program: Program, run: Any) -> float:
        found = program.largest_difference(run)
        record_property("difference", found)
        return found

    return difference
