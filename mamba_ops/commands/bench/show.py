"""Figures as a table for a terminal of 80 columns, as a page of Markdown, as a plot, and as JSON."""

import io
import json
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

from mamba_ops.commands.bench.host import GIVEN
from mamba_ops.commands.bench.run import Row

WIDTH = 80
HOST = "Host: one eager call, in launches of a Triton kernel with one argument"
MARKS = {"refused": "refuses", "failed": "FAILED", "wrong": "WRONG", "not reached": "not reached"}


def lines(found: Row) -> list[RenderableType]:
    """Return what is printed of a run."""
    shown: list[RenderableType] = [*facts(found), *tables(found).values()]
    notes = [f"  {row['op']}, {row['case']}, {name}: {why}" for row, name, why in remarks(found)]
    if notes:
        shown += ["Not timed:", *notes]
    return shown + left_out(found)


def facts(found: Row) -> list[str]:
    """Return of what machine, versions and rates a run is."""
    versions = found["versions"]
    here = {name: v for name, v in versions.items() if not v.startswith("absent")}
    shown = [f"{found['device']}: " + ", ".join(f"{name} {v}" for name, v in here.items())]
    if absent := [name for name in versions if name not in here]:
        shown.append(f"Not here: {', '.join(absent)}.")
    if rates := found["rates"]:
        units = {"bytes": "{}B/s copied", "products": "{}FLOP/s in products", "exponentials": "{} exponentials/s"}
        told = [unit.format(_with_prefix(rates[name])) for name, unit in units.items() if rates.get(name)]
        shown.append(f"Floors are of what was measured here: {', '.join(told)}.")
    return shown


def left_out(found: Row) -> list[str]:
    """Return the sentence about a run that ended early, if it did."""
    return [] if found["finished"] else ["The limit, or an interruption, came first: not all was measured."]


def tables(found: Row, *, is_page: bool = False) -> dict[str, Table]:
    """Return a run's tables by their titles: one for each op, and the host's."""
    by_op: dict[str, list[Row]] = {}
    for row in found["rows"]:
        by_op.setdefault(row["op"], []).append(row)
    shown = {op: table_of(op, rows, is_page=is_page) for op, rows in by_op.items()}
    if found.get("host"):
        shown[HOST] = host_table(found["host"], is_page=is_page)
    return shown


def table_of(op: str, rows: list[Row], *, is_page: bool = False) -> Table:
    """Return the table of one op: a line for each who computes a case, beside the case's floor."""
    table = _table(op, is_page)
    table.add_column("case", max_width=None if is_page else 34)
    for heading in ("kernels", "us", "/floor", "/best", "error"):
        table.add_column(heading, justify="left" if heading == "kernels" else "right", no_wrap=heading != "kernels")
    for row in rows:
        timed = [each["us"] for each in row["contestants"] if "us" in each]
        if "failed" in row:
            table.add_row(row["case"], "-", "FAILED")
            continue
        table.add_row(row["case"], f"floor ({row['bound']})", f"{row['floor_us']:.1f}")
        for each in row["contestants"]:
            if each["status"] == "absent":
                continue
            name, case = _label(each), row["case"] if is_page else ""
            if "us" not in each:
                table.add_row(case, name, MARKS[each["status"]])
                continue
            us = each["us"]
            ratios = f"{us / row['floor_us']:.2f}", f"{us / min(timed):.2f}"
            table.add_row(case, name, f"{us:.1f}", *ratios, f"{each['error']:.0e}")
    return table


def host_table(rows: list[Row], *, is_page: bool = False) -> Table:
    """Return what eager calls cost the host, in bare launches."""
    table = _table(HOST, is_page)
    others = sorted({name for row in rows for name in row.get("us", ())} - {"bare", GIVEN})
    for heading in ("op", GIVEN, *others, "bare, us"):
        table.add_column(heading, justify="left" if heading == "op" else "right")
    for row in rows:
        if (us := row.get("us")) is None:
            table.add_row(row["op"], "FAILED")
            continue
        cells = [f"{us[name] / us['bare']:.2f}" if name in us else "-" for name in (GIVEN, *others)]
        table.add_row(row["op"], *cells, f"{us['bare']:.1f}")
    return table


def remarks(found: Row) -> list[tuple[Row, str, str]]:
    """Return what was not timed: row, who, why. Peers that are not installed are no remark."""
    told = [(row, "all", row["failed"]) for row in found["rows"] if "failed" in row]
    told += [(row | {"case": "host"}, "all", row["failed"]) for row in found.get("host", ()) if "failed" in row]
    for row in found["rows"]:
        told += [(row, each["name"], each["reason"]) for each in row["contestants"]
                 if each["status"] in ("refused", "failed", "wrong")]  # fmt: skip
    return told


def text(found: Row) -> str:
    """Return the lines as a file has them."""
    written = io.StringIO()
    console = Console(file=written, width=WIDTH, markup=False, highlight=False)
    for line in lines(found):
        console.print(line, soft_wrap=isinstance(line, str))
    return written.getvalue()


def page(found: Row) -> str:
    """Return the figures as a page of Markdown, which `benchmarks.plot` reads."""
    written = io.StringIO()
    console = Console(file=written, width=200, markup=False, highlight=False)
    console.print(f"# mamba-ops bench on {found['device']}, {found['date']}")
    for heading, table in tables(found, is_page=True).items():
        console.print(f"\n## {heading}", table)
    notes = [*facts(found), *left_out(found), f"`{found['command']}`"]
    notes += [f"not timed: {row['op']}, {row['case']}, {name}: {why}" for row, name, why in remarks(found)]
    console.print("\n".join(["", *(f"- {note}" for note in notes)]), soft_wrap=True)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def write(found: Row, folder: Path) -> list[Path]:
    """Write figures into a folder, made if it is not there: JSON, text, a page of Markdown, and the plot where
    matplotlib is installed.

    Returns the files.
    """
    folder.mkdir(exist_ok=True)
    data, plain, markdown, picture = (folder / f"bench.{kind}" for kind in ("json", "txt", "md", "png"))
    data.write_text(json.dumps(found, indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
    plain.write_text(text(found), encoding="utf-8")
    markdown.write_text(page(found), encoding="utf-8")
    try:
        plot(found, picture)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return [data, plain, markdown]
    return [data, plain, markdown, picture]


def plot(found: Row, path: Path) -> None:
    """Draw every case's times over its floor, a panel for each op.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import StrMethodFormatter

    names = list(dict.fromkeys(_label(each) for row in found["rows"] for each in row["contestants"] if "us" in each))
    panels = [op for op in dict.fromkeys(row["op"] for row in found["rows"]) if _timed(found, op)]
    heights = [sum(1 + len(timed) for _, timed in _timed(found, op)) for op in panels] or [1]
    figure = Figure(figsize=(9, 1.2 + 0.19 * sum(heights) + 0.5 * len(heights)), layout="constrained")
    axes: Any = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for op, axis in zip(panels, axes, strict=False):
        place, ticks = 0.0, []
        for row, timed in _timed(found, op):
            ticks.append((place + (len(timed) - 1) / 2, row["case"]))
            for each in timed:
                over = each["us"] / row["floor_us"]
                color = f"C{names.index(_label(each)) % 10}"
                axis.barh(place, over, height=0.9, color=color)
                axis.text(over, place, f" {each['us']:,.1f} us", va="center", fontsize=7)
                place += 1
            place += 1
        axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.axvline(1, color="black", linewidth=0.8)
        axis.margins(x=0.15)
        axis.set_title(op, loc="left", fontsize=9)
    marks = [Patch(color=f"C{number % 10}") for number in range(len(names))]
    if marks:
        figure.legend(marks, names, loc="outside lower center", ncols=min(len(names), 4), fontsize=8)
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "triton", "mamba_ops"))
    figure.suptitle(
        f"Time over the floor: {found['device']}\n{versions}, {found['date']}; {found['command']}", fontsize=9
    )
    figure.savefig(path, dpi=110)


def _table(title: str, is_page: bool) -> Table:
    """Return a table for a terminal, or one for a page, which has its title as a heading."""
    if is_page:
        return Table(box=MARKDOWN)
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _with_prefix(number: float) -> str:
    prefix, unit = next((p for p in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if number >= p[1]), ("", 1.0))
    return f"{number / unit:.3g} {prefix}"


def _label(each: Row) -> str:
    return each["name"] if each["kind"] == "peer" else f"ours, {each['name']}"


def _timed(found: Row, op: str) -> list[tuple[Row, list[Row]]]:
    """Return the cases of an op of which anything was timed, each with whose times there are."""
    rows = [(row, [each for each in row["contestants"] if "us" in each]) for row in found["rows"] if row["op"] == op]
    return [(row, timed) for row, timed in rows if timed]
