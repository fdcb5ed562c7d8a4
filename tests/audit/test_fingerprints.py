"""The names of findings: the same where code is moved in its file or formatted, another where it is another."""

from pathlib import Path

from mamba_ops.audit.fingerprints import fingerprint, statement
from mamba_ops.audit.report import Finding, Report, compare
from mamba_ops.audit.source_locations import SourceLocation

PLAIN = """
def forward(self, x):
    y = self.scale(x, "fast")
    if y.sum() > 0:
        return y
    return -y
"""
MOVED = """
import math

def helper():
    return math.pi

def forward(
    self,
    x,
):
    # the scale comes first
    y = self.scale(
        x,
        'fast',
    )
    if (
        y.sum() > 0  # waits
    ):
        return y
    return -y
"""


def names(folder: Path, text: str, *wanted: str) -> list[str]:
    """Write the text to a file, and return the fingerprints of the lines that hold these words."""
    folder.mkdir(exist_ok=True)
    file = folder / "model.py"
    file.write_text(text)
    lines = text.splitlines()
    numbers = [next(n for n, line in enumerate(lines, 1) if word in line) for word in wanted]
    places = [SourceLocation.of(str(file), number, "forward") for number in numbers]
    return [fingerprint("sync", "item", "item", where) for where in places]


def test_moved_and_formatted_lines_keep_their_names(tmp_path: Path) -> None:
    words = "self.scale", "y.sum()", "return -y"
    plain, moved = names(tmp_path / "a", PLAIN, *words), names(tmp_path / "b", MOVED, *words)
    assert plain == moved
    assert len(set(plain)) == 3


def test_any_line_of_a_statement_is_that_statement(tmp_path: Path) -> None:
    assert len(set(names(tmp_path, MOVED, "self.scale", "'fast'"))) == 1


def test_other_code_has_another_name(tmp_path: Path) -> None:
    before = names(tmp_path / "a", PLAIN, "y.sum()")
    assert names(tmp_path / "b", PLAIN.replace("y.sum() > 0", "y.sum() > 1"), "y.sum()") != before
    where = SourceLocation("model.py", 3, "forward", "x")
    assert fingerprint("sync", "item", "a", where) != fingerprint("sync", "item", "b", where)
    assert fingerprint("recompile", "limit", "f after line 3", where) == fingerprint(
        "recompile", "limit", "f after line 9", where
    )


def test_code_that_cannot_be_read_is_named_by_its_line(tmp_path: Path) -> None:
    assert statement(SourceLocation("<string>", 3, "f", "y = x . item()")) == "y=x.item()"
    file = tmp_path / "broken.py"
    file.write_text("def f(:\n  y = x.item()\n")
    assert statement(SourceLocation.of(str(file), 2, "f")) == "y=x.item()"


def test_of_equal_statements_the_added_ones_are_new() -> None:
    def finding(line: int, count: int = 1) -> Finding:
        where = SourceLocation("model.py", line, "forward", "y = x.item()")
        return Finding("sync", "item", "error", ".item()", "it waits", "do not", where, count=count, breaks=True)

    before, now = Report("m", findings=[finding(3)]), Report("m", findings=[finding(13, 2), finding(14)])
    assert [(change.what, change.after) for change in compare(now, before)] == [("new", 1), ("more", 2)]
    assert [found.where.line for found in now.failing(["new"], before)] == [14]
    assert now.failing(["recompile", "new"], before) == []
    assert len(now.failing(["break"], before)) == 2
    assert before.failing(["new"], now) == []
