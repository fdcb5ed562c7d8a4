"""Draws the README's figure from pages in results/, and prints its caption: nothing in it that is not on a page.

Left, each peer's time over ours for the same call; right, what an eager call costs the host, in bare launches.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
DEVICE = "NVIDIA-H200"
TIMES = ("us", "forward + backward us")
"""Columns of times that rows of one case are compared by."""
OURS = ("ours", "ours, triton")
HOST = ("ours/bare", "launches watched/bare")


class Page(NamedTuple):
    """A dated page: its benchmark, its tables by heading, each a list of rows, and its notes."""

    name: str
    date: str
    tables: dict[str, list[dict[str, str]]]
    notes: list[str]


class Bar(NamedTuple):
    """One peer beside ours: microseconds of the same call."""

    what: str
    peer: str
    ours_us: float
    peer_us: float


def read(path: Path) -> Page:
    """Read a page that a benchmark wrote."""
    date, _, name = re.fullmatch(r"([\d-]+)_([\w-]+?)_(\w+)", path.stem).groups()  # type: ignore[union-attr]
    tables: dict[str, list[dict[str, str]]] = {}
    heading, columns, notes = "", [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading, columns = line.removeprefix("## "), []
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not columns:
                columns = cells
            elif set(line) - set("|-"):
                tables.setdefault(heading, []).append(dict(zip(columns, cells, strict=True)))
        elif line.startswith("- "):
            notes.append(line.removeprefix("- "))
    return Page(name, date, tables, notes)


def pages(device: str, folder: Path = RESULTS) -> list[Page]:
    """Return the pages of a device, of each benchmark the newest."""
    found = {page.name: page for page in map(read, sorted(folder.glob(f"*_{device}_*.md")))}
    return list(found.values())


def bars(found: list[Page]) -> Iterator[Bar]:
    """Yield each row of a peer that stands beside one of ours; a page says of some calls why they were not timed."""
    for page in found:
        for heading, rows in page.tables.items():
            key = next((time for time in TIMES if time in rows[0]), None)
            who = next((name for name in ("kernels", "") if name in rows[0]), None)
            if key is None or who is None:
                continue
            timed = [row for row in rows if re.fullmatch(r"[\d.]+", row[key])]
            ours = {row.get("case", ""): row[key] for row in timed if row[who] in OURS}
            suffix = ", forward and backward" if key == TIMES[1] else ""
            for row in timed:
                case = row.get("case", "")
                if not row[who].startswith(("ours", "floor")) and case in ours:
                    what = heading + (f", {case}" if case else "") + suffix
                    yield Bar(what, row[who], float(ours[case]), float(row[key]))


def host(found: list[Page]) -> dict[str, tuple[float, float]]:
    """Return by op what a call costs in bare launches: usually, and watched."""
    rows = [row for page in found for table in page.tables.values() for row in table if HOST[0] in row]
    return {row["op"]: (float(row[HOST[0]]), float(row[HOST[1]])) for row in rows}


def caption(found: list[Page], device: str) -> str:
    """Return what the figure shows, with versions, dates and commands."""
    used = [page for page in found if [*bars([page])] or host([page])]
    versions = sorted({match for page in used for note in page.notes for match in re.findall(r"torch [\d.]+", note)})
    tritons = {match for page in used for note in page.notes for match in re.findall(r"(?i:triton) ([\d.]+\d)", note)}
    commands = [note.strip("`").partition(" --")[0] for page in used for note in page.notes if note.startswith("`")]
    dates = sorted({page.date for page in used})
    versions += [f"Triton {version}" for version in sorted(tritons)]
    ran = ", ".join(f"`{command}`" for command in dict.fromkeys(commands))
    return f"{device.replace('-', ' ')}, {', '.join(versions)}, {' and '.join(dates)}; {ran}"


def _us(us: float) -> str:
    return f"{us:,.1f} us" if us < 100 else f"{us:,.0f} us"


def draw(found: list[Page], device: str, path: Path) -> None:
    """Draw both panels."""
    from matplotlib.figure import Figure

    beside, of_host = [*bars(found)], host(found)
    rows = max(len(beside), len(of_host))
    figure = Figure(figsize=(11, 1.4 + 0.42 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    axes: list[Any] = [figure.add_subplot(grid[: len(bars_of), side]) for side, bars_of in enumerate((beside, of_host))]
    times, launches = axes
    times.barh(range(len(beside)), [bar.peer_us / bar.ours_us for bar in beside], color="C0")
    for place, bar in enumerate(beside):
        ratio = bar.peer_us / bar.ours_us
        shown = f" {ratio:.2f}x: ours {_us(bar.ours_us)},\n {bar.peer} {_us(bar.peer_us)}"
        times.text(ratio, place, shown, va="center", fontsize=8)
    times.set_xlim(0, 2.4 * max(bar.peer_us / bar.ours_us for bar in beside))  # room for what is written beside bars
    times.set_yticks(range(len(beside)), [bar.what.replace(", ", "\n", 1) for bar in beside], fontsize=8)
    times.set_title("A peer's time over ours: right of 1, ours is faster", fontsize=9, loc="left")
    launches.barh(
        range(len(of_host)), [watched for _, watched in of_host.values()], color="C7", label="watched by a hook"
    )
    launches.barh(range(len(of_host)), [usual for usual, _ in of_host.values()], color="C0", label="a call")
    launches.set_yticks(range(len(of_host)), of_host, fontsize=8)
    launches.set_title("Host time of an eager call, in bare Triton launches", fontsize=9, loc="left")
    launches.legend(fontsize=8)
    for axis in axes:
        axis.axvline(1, color="black", linewidth=0.8)
        axis.margins(y=0.02)
        axis.invert_yaxis()
    figure.suptitle(caption(found, device).replace("`", "").replace("; ", "\n", 1), fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", default=DEVICE, help=f"as in the names of pages; default: {DEVICE}")
    parser.add_argument("--out", type=Path, default=Path("docs/h200.png"), metavar="FILE")
    options = parser.parse_args()
    found = pages(options.device)
    if not any(True for _ in bars(found)):
        parser.error(
            f"--device: got {options.device}, expected one of which pages in {RESULTS} have a peer beside ours"
        )
    draw(found, options.device, options.out)
    print(caption(found, options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
