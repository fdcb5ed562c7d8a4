"""The fixture `graph_audit`, which pytest finds where mamba-ops is installed.

It stands outside the package, because pytest loads it in every run, and the package brings torch.
"""

import pytest


@pytest.fixture
def graph_audit():
    """Return `mamba_ops.testing.assert_one_graph`."""
    from mamba_ops.testing import assert_one_graph

    return assert_one_graph
