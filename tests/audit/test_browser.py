"""The page in a real browser: it renders, its links lead somewhere, and its text can be read, in light and in dark."""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest

pytest.importorskip("jinja2")
from mamba_ops.audit.html import page
from mamba_ops.audit.outcomes import Counts, Try

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium, from the system's packages")
LOOK = """
<script>
const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = c => {
  const [r, g, b] = c.match(/[\\d.]+/g).map(v => linear(v / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const ground = e => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (!c.startsWith("rgba(") && c !== "transparent") return c;
  }
  return "rgb(255, 255, 255)";
};
const text = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
const contrast = e => {
  const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
  return (a + .05) / (b + .05);
};
const shown = [...document.body.querySelectorAll("*")].filter(e => text(e) && e.tagName !== "SCRIPT");
const dead = [...document.querySelectorAll("a[href^='#']")].filter(a => {
  a.click();
  const there = document.querySelector(":target");
  return !there || there.getBoundingClientRect().top > innerHeight;
});
const found = {
  contrast: Math.min(...shown.map(contrast)), texts: shown.length, ground: light(ground(document.body)),
  links: document.querySelectorAll("a[href]").length, dead: dead.map(a => a.getAttribute("href")),
  overflow: document.documentElement.scrollWidth - innerWidth, loaded: performance.getEntriesByType("resource").length,
};
const said = document.createElement("pre");
said.id = "found";
said.textContent = JSON.stringify(found);
document.body.append(said);
</script>
"""


@pytest.fixture(scope="module")
def html(deep, clean):
    """A page with findings, a picture, links and a comparison, which looks at itself."""
    counts = Counts(2, 1, 0, 0.5, 0.001), Counts(1, 0, 0, 0.4, 0.001)
    names = (deep.findings[0].fingerprint,)
    tries = [
        Try("a flag of Dynamo's", names, *counts, names),
        Try("use_mamba_ops(model)", (), *counts, ours=True),
    ]
    text = page(dataclasses.replace(deep, tries=tries), clean)
    assert "</body>" in text
    return text.replace("</body>", LOOK + "</body>")


@pytest.mark.parametrize(("dark", "width"), [(False, 1000), (True, 500)])
def test_it_can_be_read(html, tmp_path, dark, width):
    file = tmp_path / "report.html"
    file.write_text(html)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},1400"]
    options += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    shot = tmp_path / "shot.png"
    run = [BROWSER, *options, f"--user-data-dir={tmp_path}/profile"]
    subprocess.run([*run, f"--screenshot={shot}", file.as_uri()], check=True, capture_output=True, timeout=120)
    assert shot.stat().st_size > 10_000
    dom = subprocess.run([*run, "--dump-dom", file.as_uri()], check=True, capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', dom.stdout)[1])
    assert found["texts"] > 20
    assert found["contrast"] >= 4.5, found
    assert (found["ground"] < 0.1) == dark
    assert found["links"] > 2
    assert found["dead"] == []
    assert found["overflow"] <= 0
    assert found["loaded"] == 0  # it is one file
