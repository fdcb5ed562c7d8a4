"""Where an engine may cut a graph: metadata of the ops, published as the names that engines list."""

from mamba_ops.registry import tables


def splitting_ops() -> list[str]:
    """Return the qualified names (`namespace::op`) of all ops declared with `splits_graph=True`."""
    return [op.qualname for op in tables.ops.values() if op.splits_graph]
