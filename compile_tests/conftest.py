"""The same ground as under the tests."""

from tests.conftest import device, fresh_dynamo, pytest_runtest_setup

__all__ = ["device", "fresh_dynamo", "pytest_runtest_setup"]
