"""The page about XPU shows what `scripts/xpu_evidence.py` prints, and the owner's report can be written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_rows_that_the_command_prints():
    from scripts import xpu_evidence

    page = (ROOT / "docs" / "xpu.md").read_text(encoding="utf-8")
    for what, how in xpu_evidence.ROWS.values():
        assert f"| {what} | {how} | " in page
    assert "| what | how | result |" in page
    assert xpu_evidence.table(lambda name: name).count("\n") == len(xpu_evidence.ROWS) + 1


@pytest.mark.slow
def test_an_owners_report_is_one_file(tmp_path: Path):
    path = tmp_path / "report.json"
    command = [sys.executable, "scripts/gpu_report.py", "--quick", "--json", path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    report = json.loads(path.read_text())
    assert set(report) == {"facts", "doctor", "backends", "tests", "kernels"}
    assert {report[stage]["status"] for stage in set(report) - {"facts"}} == {0}
    assert report["tests"]["tests"] > 0
    assert report["tests"]["failed"] == {}
    assert "Versions" in report["doctor"]["output"]
    assert report["kernels"]["measured"]
