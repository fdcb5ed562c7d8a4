"""The page in a real browser: it renders, in light and in dark, and its text can be read."""

import re
import shutil
import subprocess

import pytest

pytest.importorskip("jinja2")
from compile_tests.planted import CASES
from mamba_ops.audit import audit
from mamba_ops.audit.html import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium, from the system's packages")
@pytest.mark.parametrize("dark", [False, True])
def test_it_renders(tmp_path, dark):
    [case] = [case for case in CASES if case.name == "deep"]
    file = tmp_path / "report.html"
    file.write_text(page(audit(case.model().eval(), *case.calls()[0])))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1400"]
    options += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    shot = tmp_path / "shot.png"
    run = [BROWSER, *options, f"--user-data-dir={tmp_path}/profile"]
    subprocess.run([*run, f"--screenshot={shot}", file.as_uri()], check=True, capture_output=True, timeout=120)
    assert shot.stat().st_size > 10_000
    dom = subprocess.run([*run, "--dump-dom", file.as_uri()], check=True, capture_output=True, text=True, timeout=120)
    assert 'id="verdict"' in dom.stdout


def _luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_its_text_stands_out(dark):
    """Contrast of 4.5 at least between every colour of text and what it stands on."""
    from importlib import resources

    style = resources.files("mamba_ops.audit").joinpath("report.html.j2").read_text(encoding="utf-8")
    light_block, dark_block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", light_block))
    if dark:
        colours |= dict(re.findall(r"--(\w+): (#\w{6})", dark_block))
    grounds = {"text": ("ground", "panel", "mark", "split", "p0", "p1", "p2", "p3", "p4"), "dim": ("ground", "panel")}
    grounds |= dict.fromkeys(("error", "warning", "note", "good", "link"), ("ground",))
    for text, behind in grounds.items():
        for ground in behind:
            bright, dim = sorted((_luminance(colours[text]), _luminance(colours[ground])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, ground)
