"""Small models with one known defect each, and their clean twins; tests/audit looks for every defect by its line."""

from compile_tests.planted.cases import CASES, Case

__all__ = ["CASES", "Case"]
