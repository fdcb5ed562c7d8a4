"""`mamba-ops ops`: what the ops compute, and the code that is generated for them."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.syntax import Syntax

from mamba_ops import registry
from mamba_ops.commands import ops_page
from mamba_ops.commands.options import fail


def ops(
    name: Annotated[str | None, typer.Argument(help="The op to show.", show_default="all of them")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As it is in docs/ops.md.")] = False,
    source: Annotated[
        bool, typer.Option("--source", help="The Python generated for NAME: its front, and the body torch calls.")
    ] = False,
) -> None:
    """Say what the ops compute, what their arguments are, and what each backend does not take."""
    known = registry.ops()
    if name is not None and name not in known:
        fail(f"there is no op {name!r}; ops: {', '.join(sorted(known))}")
    if source:
        if name is None:
            fail("--source needs the name of an op")
        _print_source(known[name].source_code())
        return
    if markdown:
        print(ops_page.page() if name is None else ops_page.section(known[name]), end="")
    elif name is None:
        _print_overview()
    else:
        console = Console()
        console.print(Markdown(ops_page.section(known[name], columns=console.width - 2)))


def _print_overview() -> None:
    """Print what each op computes, changes and has kernels from, in lines that are no wider than the terminal."""
    console = Console(highlight=False, markup=False)
    for op in ops_page.own_ops():
        console.print(op.name, style="bold")
        console.print(Padding(ops_page.summary(op), (0, 0, 0, 2)))
        facts = [
            f"backends: {', '.join(backend.name for backend in registry.backends() if backend.name in op.kernels)}"
        ]
        if kept := sorted(op.mutates - {"output"}):
            facts.append(f"mutates {', '.join(kept)} besides out")
        if op.splits_graph:
            facts.append("engines cut their graphs here")
        console.print(Padding("; ".join(facts), (0, 0, 0, 2)), style="dim")
    console.print("\n`mamba-ops ops NAME` shows all about one; `mamba-ops ops --markdown` prints the page docs/ops.md.")


def _print_source(code: str) -> None:
    """Highlight on a terminal; print as it is into a file, which an editor or a diff reads."""
    console = Console()
    if console.is_terminal:
        console.print(Syntax(code, "python", background_color="default", word_wrap=True))
    else:
        print(code, end="")
