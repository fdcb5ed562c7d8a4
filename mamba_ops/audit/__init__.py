"""Reports why a model breaks under torch.compile, where, and what to change: `audit` for a model, `watch` for code."""

from mamba_ops.audit.outcomes import Graph, GraphSegment
from mamba_ops.audit.report import Change, Finding, Report, compare
from mamba_ops.audit.run import ModelError, audit
from mamba_ops.audit.source_locations import SourceLocation
from mamba_ops.audit.watching import watch

__all__ = [
    "audit",
    "watch",
    "compare",
    "Change",
    "Finding",
    "Graph",
    "GraphSegment",
    "ModelError",
    "Report",
    "SourceLocation",
]
