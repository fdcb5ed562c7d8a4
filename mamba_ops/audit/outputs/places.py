"""Where a finding is shown in a repository: the user's own line, as a path inside the folder of the checkout."""

from pathlib import Path

from mamba_ops.audit.report import Finding
from mamba_ops.audit.show import caller
from mamba_ops.audit.source_locations import SourceLocation


def place(finding: Finding, root: Path) -> SourceLocation | None:
    """Return the line of the repository that a finding belongs to: its own, or that of the caller of a package's code.

    Args:
        finding: a finding.
        root: the folder of the repository, which the path is relative to.
    """
    own = [finding.where] if finding.where is not None else []
    for location in [*caller(finding), *own, *reversed(finding.stack)]:
        path = Path(location.file)
        if path.is_relative_to(root) and "site-packages" not in path.parts:
            relative = path.relative_to(root).as_posix()
            return SourceLocation(relative, location.line, location.function, location.source)
    return None
