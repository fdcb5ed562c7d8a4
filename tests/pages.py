"""The code on our pages: its blocks, the files that they are, and the program that the others make."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ([\w./]+\.(?:py|toml))\n")


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Yield the line that each block of a language begins on, and its text."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match[1] == language:
            yield text.count("\n", 0, match.start(2)), match[2]


def write_files(page: Path, folder: Path) -> list[Path]:
    """Write each block that begins with a file's name below a folder; return the files."""
    written = []
    for language in ("python", "toml"):
        for _, text in blocks(page, language):
            if name := FILE.match(text):
                path = folder / name[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
                written.append(path)
    return written


def cells(notebook: Path) -> tuple[str, list[str]]:
    """Return a notebook's code as one program, and what each of its cells prints that prints anything."""
    found = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    printed = ["".join(output["text"]) for cell in found for output in cell["outputs"]]
    return "\n".join("".join(cell["source"]) for cell in found), printed


def program(page: Path) -> str:
    """Return the page's other `python` blocks as one program in which lines keep their numbers, for tracebacks.

    A block marked `py` is a sketch and does not run; `output` is what the program prints on a CPU.
    """
    lines: list[str] = []
    for line, text in blocks(page, "python"):
        if not FILE.match(text):
            lines += [""] * (line - len(lines)) + text.splitlines()
    return "\n".join(lines)
