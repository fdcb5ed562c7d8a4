"""The fixtures `graph_audit` and `audit_baseline`, which pytest finds where mamba-ops is installed.

They stand outside the package, because pytest loads it in every run, and the package brings torch.
"""

import pytest


@pytest.fixture
def graph_audit():
    """Return `mamba_ops.testing.assert_one_graph`."""
    from mamba_ops.testing import assert_one_graph

    return assert_one_graph


@pytest.fixture
def audit_baseline():
    """Return `mamba_ops.testing.assert_nothing_new`."""
    from mamba_ops.testing import assert_nothing_new

    return assert_nothing_new
