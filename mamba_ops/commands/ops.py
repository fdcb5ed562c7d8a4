"""`mamba-ops ops`: what the ops compute, and the code that is generated for them."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
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
    text = ops_page.page() if name is None else ops_page.section(known[name])
    if markdown:
        print(text, end="")
    else:
        Console().print(Markdown(text))


def _print_source(code: str) -> None:
    """Highlight on a terminal; print as it is into a file, which an editor or a diff reads."""
    console = Console()
    if console.is_terminal:
        console.print(Syntax(code, "python", background_color="default", word_wrap=True))
    else:
        print(code, end="")
