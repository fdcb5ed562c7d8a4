"""A report as text to paste into an issue: versions, the smallest finding, its code, and nothing about its author."""

import contextlib
import getpass
import importlib.metadata
import os
import platform
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from mamba_ops.audit.report import SEVERITIES, Finding, Report
from mamba_ops.audit.show import excerpt, lines

_PACKAGES = ("mamba-ops", "torch", "triton", "transformers", "numpy")
_SECRET = re.compile(r"token|secret|passw|api_?key|credential|private_?key|access_?key", re.IGNORECASE)
_TOKENS = (  # forms of tokens that services give out, and values that are called a secret
    r"\b(?:hf|ghp|gho|ghu|ghs|ghr|glpat|xox[abprs]|npm|pypi|sk|pk|rk)[_-][A-Za-z0-9_-]{8,}",
    r"\bgithub_pat_\w{10,}",
    r"\bAKIA[0-9A-Z]{12,}",
    r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*",
    r"(?i)\bbearer\s+[\w.~+/-]{8,}=*",
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)",
    r"\b[A-Fa-f0-9]{32,}\b",
)
_NAMED = re.compile(
    r"""(?ix)(\b\w*(?:token|secret|passw(?:or)?d|api_?key|access_?key|credentials?)\w*["']?\s*[=:]\s*)(["'][^"'\n]+["'])"""
)
_FOLDERS = re.compile(
    r"(?<![\w.~:/\\])(?:/(?:[\w.@+-]+/)+|[A-Za-z]:\\+(?:[^\\\s\"'`]+\\+)+)(?=[\w.])"
)  # of an absolute path


def issue(report: Report) -> str:
    """Return Markdown; what names the user, their machine or their folders, or looks like a secret, is left out.

    The finding is the smallest of the worst: the one that the fewest calls lead to.
    """
    text = "\n".join(_lines(report))
    return cleaned(text)


def _lines(report: Report) -> Iterator[str]:
    yield f"### `{report.target}` under torch.compile"
    yield ""
    yield report.verdict
    finding = smallest(report)
    if finding is not None:
        yield from ("", "```text", *lines(finding, report.tries), "```")
        if finding.where is not None and (code := excerpt(finding.where)):
            yield from ("", "```py", *(f"{text}{'  # <- here' if here else ''}" for _, text, here in code), "```")
        others = len(report.findings) - 1
        if others:
            yield from (
                "",
                f"{others} more finding{'s' * (others > 1)} of the same run {'are' if others > 1 else 'is'} left out.",
            )
    yield ""
    absent = ", which is not present" if report.absent else ""
    yield f"- device: {report.device}{absent}"
    yield f"- Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in _PACKAGES:
        version = report.torch if name == "torch" else _version(name)
        if version:
            yield f"- {name} {version}"


def smallest(report: Report) -> Finding | None:
    """Return the finding of the worst severity that the fewest calls lead to, or None."""
    found = sorted(report.findings, key=lambda f: (SEVERITIES.index(f.severity), f.where is None, len(f.stack)))
    return found[0] if found else None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cleaned(text: str) -> str:
    """Return a text without home folders, the names of the user and of their machine, tokens and passwords."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, "[left out]")
    for pattern in _TOKENS:
        text = re.sub(pattern, "[left out]", text)
    text = _NAMED.sub(r'\1"[left out]"', text)
    text = re.sub(r"(?:[A-Za-z]:)?[^\s\"'`]*site-packages[/\\]", "", text)
    folders = {f"{Path.cwd()}{os.sep}": "", str(Path.home()): "~"}
    for folder in sorted(folders, key=len, reverse=True):  # the inner one first
        text = text.replace(folder, folders[folder])
    text = _FOLDERS.sub(".../", text)
    for name in _names():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", "[name]", text)
    return text


def _names() -> list[str]:
    """Return the names of the user and the machine, where they are no words that code holds anyhow."""
    names = {value for name, value in os.environ.items() if name in ("USER", "LOGNAME", "USERNAME", "HOSTNAME")}
    with contextlib.suppress(KeyError, OSError, ImportError):  # a user without an entry in the table of passwords
        names |= {getpass.getuser(), socket.gethostname()}
    return sorted((name for name in names - {"root", "user", "localhost"} if len(name) > 2), key=len, reverse=True)
