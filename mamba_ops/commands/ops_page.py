"""The page about all ops, docs/ops.md: generated from the registry, so that the two agree."""

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mamba_ops.registry import Backend, Op, backends, ops

_SECTION = re.compile(r"^(\w+):$")
_ARGUMENT = re.compile(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)$")


VALUES = """
Slots, `cu_seqlens` and other indices lead into caches and tokens. On a CPU one that is out of range is a
ValueError, which names the argument, the row and the value, before anything is written. On a device that would mean
to wait for it, so there a slot that the cache does not have counts as the null slot, the bounds of rows are kept
within the tokens, and other numbers within their range: nothing outside the call's tensors is read or written (by
`torch` and `triton`; vendors' kernels look at nothing). `with mamba_ops.checking():`, or `MAMBA_OPS_CHECK=1` in the
environment, makes it a ValueError on a device too, and every call wait; calls that a graph captures are not
checked.
""".splitlines()
"""What holds for the values of all ops' arguments."""


def page() -> str:
    """Return the page, in Markdown."""
    known = own_ops()
    own = [
        backend for backend in backends() if Path(__file__).parents[1] in Path(backend.source).parents
    ]  # without plug-ins
    lines = [
        "# The ops",
        "",
        "Made by `mamba-ops ops --markdown > docs/ops.md`; a test compares it with the code. Arguments are those of",
        "the fronts, `mamba_ops.<name>`; at `torch.ops.mamba_ops.<name>` `out` is `output`, and must be given.",
        *VALUES,
        "",
        *_overview(known, own),
        "",
    ]
    return "\n".join([*lines, *(section(op, own) for op in known)])


def own_ops() -> list[Op[...]]:
    """Return the ops of this package that users call, by name."""
    known = [op for op in ops().values() if op.qualname.startswith("mamba_ops::") and not op.returns]
    return sorted(known, key=lambda op: op.name)


def summary(op: Op[...]) -> str:
    """Return the first paragraph of what an op computes, in one line."""
    return _parts(op.__doc__ or "")[0].partition("\n\n")[0].replace("\n", " ")


def section(op: Op[...], shown: Iterable[Backend] | None = None, *, columns: int = 100) -> str:
    """Return what the page says about one op: signature, contract, arguments, backends and their limits."""
    text, arguments, others = _parts(op.__doc__ or "")
    mutated = ", ".join(f"`{'out' if name == 'output' else name}`" for name in sorted(op.mutates))
    facts = [f"Mutates {mutated}."]
    if op.splits_graph:
        facts.append("Engines cut their graphs here.")
    if op.reads_host:
        facts.append("It reads a tensor on the host, and is not captured in CUDA graphs.")
    lines = [
        f"## `{op.name}`",
        "",
        "```py",
        _signature(op, columns),
        "```",
        "",
        *_as_markdown(text),
        "",
        "| argument | what |",
        "|---|---|",
        *(f"| {_names(names)} | {_cell(what)} |" for names, what in arguments),
        "",
        *_as_markdown(others),
        "",
        " ".join(facts),
        "",
        *_kernels(op, backends() if shown is None else shown),
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _overview(known: list[Op[...]], shown: list[Backend]) -> Iterator[str]:
    yield (
        "| op | what | mutates besides `out` | splits graphs | " + " | ".join(backend.name for backend in shown) + " |"
    )
    yield "|---" * (4 + len(shown)) + "|"
    for op in known:
        mutated = ", ".join(f"`{name}`" for name in sorted(op.mutates - {"output"}))
        kernels = ["x" if backend.name in op.kernels else "" for backend in shown]
        cells = [f"[`{op.name}`](#{op.name})", summary(op), mutated, "yes" if op.splits_graph else "", *kernels]
        yield f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _parts(docstring: str) -> tuple[str, list[tuple[str, str]], str]:
    """Take a docstring apart: what comes before its arguments, the arguments, and what comes after them."""
    before: list[str] = []
    after: list[str] = []
    arguments: list[tuple[str, str]] = []
    section = None
    for line in inspect.cleandoc(docstring).splitlines():
        if found := _SECTION.match(line):
            section = found[1]
            after += [] if section == "Args" else [f"**{section}**", ""]
        elif section == "Args" and line.startswith("    "):
            if found := _ARGUMENT.match(line):
                arguments.append((found[1], found[2]))
            else:
                names, what = arguments[-1]
                arguments[-1] = (names, f"{what} {line.strip()}")
        elif section and line.startswith("    "):
            after.append(f"- {line.strip()}" if line[4] != " " else line[4:])
        else:
            section = section if not line else None
            (after if arguments else before).append(line)
    return "\n".join(before).strip(), arguments, "\n".join(after).strip()


def _as_markdown(text: str) -> Iterator[str]:
    """Fence the indented paragraphs of a docstring; the others are Markdown already."""
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        if lines and all(line.startswith("    ") for line in lines):
            yield from ("```text", *(line.removeprefix("    ") for line in lines), "```")
        else:
            yield from lines
        yield ""


def _signature(op: Op[...], columns: int) -> str:
    lines, line = [], f"{op.name}("
    names = []
    parameters = inspect.signature(op).parameters.values()
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        names.append(p.name if p.default is p.empty else f"{p.name}={p.default}")
    for i, name in enumerate(names):
        word = name + (", " if i < len(names) - 1 else ")")
        if len(line) + len(word) > columns:
            lines.append(line.rstrip())
            line = "    "
        line += word
    return "\n".join([*lines, line])


def _names(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _kernels(op: Op[...], shown: Iterable[Backend]) -> Iterator[str]:
    yield "| backend | runs on | limits |"
    yield "|---|---|---|"
    for backend in shown:
        if (kernel := op.kernels.get(backend.name)) is None:
            continue
        devices = "any device" if backend.devices is None else ", ".join(backend.devices)
        limits = kernel.unsupported and kernel.unsupported.__doc__
        if limits is None and isinstance(kernel.implementation, str):  # then the adapter's docstring holds the limits
            limits = kernel.function.__doc__
        if limits is None:
            limits = "what the backends of the ops inside have" if op.composed and backend.devices is None else "none"
        yield f"| {backend.name} | {devices} | {_cell(' '.join(limits.split()))} |"
