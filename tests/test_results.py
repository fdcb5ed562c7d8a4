"""README's figures of the H200 are those of the newest pages in benchmarks/results, and say of what."""

import re
from pathlib import Path

import pytest

from benchmarks import plot
from tests.pages import ROOT

PAGE = """# Gated delta rule on NVIDIA X, 2026-01-02

## chunk_kda

| case            | kernels |    us | ours/this |
|-----------------|---------|-------|-----------|
| 1 x 4096 tokens | ours    | 100.0 |      1.00 |
| 1 x 4096 tokens | fla     | 150.0 |      0.67 |
| 2 x 4096 tokens | fla     | 150.0 |      0.67 |
| 1 x 4096 tokens | floor   |  50.0 |           |

- torch 2.11.0+cu130, triton 3.6.0; fla 0.6.0
- `python -m benchmarks.delta_rule --op chunk_kda`
"""
TRAINING = """# Training on NVIDIA X, 2026-01-03

## scan

|           | forward us | forward + backward us |
|-----------|------------|-----------------------|
|      ours |      200.0 |                 400.0 |
| mamba_ssm |      300.0 |                1000.0 |

- torch 2.11.0+cu130, triton 3.6.0
- `python -m benchmarks.training`
"""
HOST = """# The host's part of a call on NVIDIA X, 2026-01-03

## One eager call, output given

|   op | ours us | ours/bare | launches watched/bare |
|------|---------|-----------|-----------------------|
| scan |    20.0 |      1.50 |                  6.00 |

- torch 2.11.0+cu130, Triton 3.6.0
- `python -m benchmarks.host`
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {"2026-01-02_NVIDIA-X_delta_rule": PAGE, "2026-01-03_NVIDIA-X_training": TRAINING}.items():
        (tmp_path / f"{name}.md").write_text(text)
    (tmp_path / "2026-01-03_NVIDIA-X_host.md").write_text(HOST)
    (tmp_path / "2026-01-01_NVIDIA-X_delta_rule.md").write_text(PAGE.replace("150.0", "999.0"))  # an older one
    (tmp_path / "2026-01-03_NVIDIA-Y_host.md").write_text(HOST.replace("1.50", "9.00"))
    return tmp_path


def test_peers_are_put_beside_ours_of_the_same_case_and_the_newest_page(folder: Path, tmp_path: Path) -> None:
    found = plot.pages("NVIDIA-X", folder)
    assert [*plot.bars(found)] == [
        plot.Bar("chunk_kda, 1 x 4096 tokens", "fla", 100.0, 150.0),
        plot.Bar("scan, forward and backward", "mamba_ssm", 400.0, 1000.0),
    ]
    assert plot.host(found) == {"scan": (1.5, 6.0)}
    assert plot.caption(found, "NVIDIA-X") == (
        "NVIDIA X, torch 2.11.0, Triton 3.6.0, 2026-01-02 and 2026-01-03; `python -m benchmarks.delta_rule`, "
        "`python -m benchmarks.host`, `python -m benchmarks.training`"
    )
    pytest.importorskip("matplotlib")
    plot.draw(found, "NVIDIA-X", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_readme_says_of_what_its_figure_is() -> None:
    """Where a page is added, `python -m benchmarks.plot` draws the figure anew and prints what README has to say."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{plot.caption(plot.pages(plot.DEVICE), plot.DEVICE)}." in readme
    assert "](docs/h200.png)" in readme
    assert (ROOT / "docs" / "h200.png").is_file()


TABLES = {
    "boundary": "(`python -m benchmarks.boundary`,",
    "host": "(`python -m benchmarks.host`,",
    "kernels": "(`python -m benchmarks.kernels`,",
    "bench": "in one run of `mamba-ops bench",
    "training": "(`python -m benchmarks.training`,",
}
"""Page, and what stands in README before the table of its figures."""


@pytest.mark.parametrize("name", TABLES)
def test_the_numbers_of_readme_are_on_the_newest_page(name: str) -> None:
    page = newest(name)
    there = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", page.read_text(encoding="utf-8"))]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, before, after = readme.partition(TABLES[name])
    assert before, f"README names no page {name}"
    table = after[after.index("\n|") : after.index("\n\n", after.index("\n|"))]
    cells = [cell for line in table.strip().splitlines()[2:] for cell in line.strip("|").split("|")[1:]]
    numbers = re.findall(r"\d+(?:\.\d+)?", " ".join(cells))
    assert len(numbers) > 5
    strays = [n for n in numbers if not any(abs(float(n) - other) <= half(n) for other in there)]
    assert not strays, f"{strays} of README are not on {page.name}"


def newest(name: str) -> Path:
    return max(plot.RESULTS.glob(f"*_{plot.DEVICE}_{name}.md"))


def half(number: str) -> float:
    """What a number may be off by where it was rounded to these digits."""
    return 0.501 * 10.0 ** -len(number.partition(".")[2])


@pytest.mark.parametrize("project", ["mamba_ssm", "fla"])
def test_readme_names_the_peers_versions_as_the_pages_do(project: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("bench", "training"):
        [version] = set(re.findall(rf"\b{project} (\d[\w.]*)", newest(name).read_text(encoding="utf-8")))
        _, _, after = readme.partition(TABLES[name])
        around = readme[len(readme) - len(after) - 300 :][:600]
        told = re.findall(rf"\b{project}(?:-core)? (\d[\w.]*\w)", around)
        assert told or (project, name) == ("fla", "training"), name
        assert all(version == each or version.startswith(f"{each}.") for each in told), (told, version)
