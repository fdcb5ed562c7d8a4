"""Remedies for lines in installed packages, which the user does not change: what their caller can do instead."""

from pathlib import Path

from mamba_ops.audit.source_locations import SourceLocation

_ENDS_GRAPHS = ("break", "sync", "kernel")
_IN_CODE = ("attribute", "constant", "length", "identity", "keys", "size-again", "size-fixed", "other-guard")


def package_of(file: str) -> str | None:
    """Return the name of the installed package that a file is in, or None."""
    parts = Path(file).parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts[:-1]:
            return parts[len(parts) - parts[::-1].index(folder)].removesuffix(".py")
    return None


def for_caller(kind: str, cause: str, op: str, stack: tuple[SourceLocation, ...]) -> str | None:
    """Return what the caller of a package can do about a finding in it; None where the rule's own remedy is for them.

    Args:
        kind, cause, op: of the finding.
        stack: the calls that led there, outermost first; the finding is at the last one.
    """
    package = package_of(stack[-1].file) if stack else None
    if package is None:
        return None
    last = max((i for i, location in enumerate(stack) if package_of(location.file) is None), default=-1)
    entered = next((location for location in stack[last + 1 :] if package_of(location.file) == package), stack[-1])
    at = f"`{stack[last].source}`" if last >= 0 and stack[last].source else f"the call of {package}"
    if kind in _ENDS_GRAPHS:
        return (
            f"The line is in {package}: leave {entered.function} out of the compiled model at {at}, or compile the "
            f"parts around it; a newer {package} may be without {op}."
        )
    if kind == "recompile" and cause in _IN_CODE:
        return f"The value is inside {package}: let {at} keep {op} the same from call to call."
    return None
