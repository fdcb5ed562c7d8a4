"""The report as data: JSON and back, grouping, comparison, what fails, and the page that it makes."""

import dataclasses
import logging
import re

import pytest

from compile_tests.planted import CASES, breaks
from mamba_ops.audit import Report, audit, compare, watch
from mamba_ops.audit.run import resize
from mamba_ops.audit.show import grouped, lines
from tests import fresh

torch = pytest.importorskip("torch")
jinja2 = pytest.importorskip("jinja2")


def test_identical_findings_of_layers_are_one(deep):
    [finding] = [f for f in deep.findings if f.cause == "disable"]
    assert len(finding.layers) == 48
    assert "layers.[0-47] (48 modules)" in "\n".join(lines(finding))
    assert len(deep.findings) == 1


def test_json_and_back(deep):
    again = Report.from_json(deep.to_json())
    assert dataclasses.asdict(again) == dataclasses.asdict(deep)
    with pytest.raises(ValueError, match="version 99, expected 3"):
        Report.from_json(deep.to_json().replace('"schema_version": 3', '"schema_version": 99', 1))


def test_comparison(deep, clean):
    assert [change.what for change in compare(clean, deep)] == ["gone"]
    assert [change.what for change in compare(deep, clean)] == ["new"]
    assert compare(deep, deep) == []


def test_what_fails(deep):
    assert deep.failing(["break"])
    assert deep.failing(["kernel"])
    assert deep.failing(["copy", "jit", "recompile"]) == []


def test_the_page_holds_each_finding_and_its_links_work(deep):
    from html.parser import HTMLParser

    from mamba_ops.audit.html import page

    links, names, loaded = set(), set(), []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            facts = dict(attrs)
            names.add(facts.get("id"))
            loaded.extend(facts[name] for name in ("src", "srcset", "data", "poster") if name in facts)
            if tag in ("link", "script", "iframe", "object", "img"):
                loaded.append(tag)
            if tag == "a" and "href" in facts:
                links.add(facts["href"])

    text = page(deep, deep)
    Parser().feed(text)
    assert links
    outside = {finding.link for finding in deep.findings}
    assert all(link in outside or (link.startswith("#") and link[1:] in names) for link in links)
    assert loaded == []
    assert not re.search(r"url\(|@import|<script", text)
    assert text.index('remedy">') < text.index("called from") < text.index("torch's page about")
    assert "compile 0/0" in text
    assert "disabled_rule(y) + x" in text
    assert f"breaks.py:{deep.findings[0].where.line}</code> in forward" in text


def test_the_page_escapes_source():
    from mamba_ops.audit.html import page

    report = Report("<script>alert(1)</script>", torch="2")
    assert "<script>" not in page(report)


def test_layers_of_one_kind_are_shown_as_ranges():
    assert grouped(("a.0.b", "a.1.b", "a.2.b", "a.5.b")) == "a.[0-2, 5].b (4 modules)"
    assert grouped(("a",)) == "a"


def test_watch_sees_a_loop_of_theirs():
    model = torch.compile(breaks.Item(), backend="aot_eager")
    with torch.no_grad(), watch() as report:
        model(breaks.x())
    assert [f.cause for f in report.findings] == ["item"]
    assert report.finished


def test_a_reset_in_watched_code_is_no_end():
    def f(x):
        return x + 1

    with watch() as report:
        torch._dynamo.reset()
        for size in (3, 4):
            torch.compile(f, backend="eager")(torch.ones(size))
    [made] = report.recompiles
    assert made.seconds > 0


def test_watch_hears_loggers_that_it_has_not_seen_before():
    """Those of Transformers hand nothing on to the root."""
    log = logging.getLogger("somebody.kernels")
    log.propagate = False
    with watch() as report:
        log.warning("The fast path is not available; install `fast-scan`.")
        log.warning("The weather is not available.")
        log.info("The fast path is not available; install `fast-scan`.")
    [found] = report.findings
    assert (found.cause, found.op) == ("optional-package", "fast-scan")
    assert found.where.file == __file__
    assert report.verdict == "Found: 1 slow path taken in silence."


def test_what_was_not_compiled_is_not_called_clean():
    with watch() as report:
        breaks.Quiet()(breaks.x())
    assert report.verdict == "Nothing was compiled."


def test_watch_sees_what_fullgraph_stops_at():
    torch._dynamo.reset()
    model = torch.compile(breaks.Explicit(), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported), watch() as report:
        model(breaks.x())
    assert [f.cause for f in report.findings] == ["explicit"]


def test_shapes_cut_and_repeat():
    tokens, mask, other = torch.arange(6).view(2, 3), torch.ones(2, 3, 4), torch.zeros(5)
    a, b, c = resize((tokens, mask, other), (1, 5))
    assert a.tolist() == [[0, 1, 2, 0, 1]]
    assert b.shape == (1, 5, 4)
    assert c is other
    with pytest.raises(ValueError, match="expected at most 2 sizes"):
        resize((tokens,), (1, 2, 3))


def test_the_model_is_left_as_it_was():
    [case] = [case for case in CASES if case.name == "counter"]
    model = case.model()
    (first, *more) = case.calls()
    audit(model, *first, calls=more)
    assert model.steps == 0


def test_it_is_there_when_asked_for():
    """Without an import of its own, which `import mamba_ops` does not make."""
    code = "import sys, mamba_ops; assert 'mamba_ops.audit' not in sys.modules"
    code += "; mamba_ops.audit.watch; mamba_ops.testing.assert_one_graph"
    done = fresh.run(["-c", code])
    assert done.returncode == 0, done.stderr
