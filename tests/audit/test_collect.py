"""What cannot run here, by the hooks themselves; and the helper for tests of models."""

import types

import pytest
import torch

from compile_tests.planted import CASES, breaks
from mamba_ops.audit import Report
from mamba_ops.audit.collect import Collector
from mamba_ops.audit.remedies import RULES, classify_guard, guard_subject, remedy
from mamba_ops.audit.report import KINDS, SEVERITIES
from mamba_ops.testing import assert_one_graph


def test_triton_compiles_are_told_by_the_call_that_they_came_in():
    """The hook is called as Triton calls it; a kernel compiled in a later call is what serving would wait for."""
    triton = pytest.importorskip("triton")
    report = Report("model")
    collector = Collector(report)
    before = triton.knobs.runtime.jit_post_compile_hook
    with collector.listen():
        hook = triton.knobs.runtime.jit_post_compile_hook
        for name in ("theirs.scan", "theirs.scan", "triton_poi_fused_0"):
            with collector.one_call("4x8"):
                hook(key="", repr="", fn=types.SimpleNamespace(name=name), compile={}, already_compiled=False)
    assert triton.knobs.runtime.jit_post_compile_hook is before
    assert [(f.cause, f.op, f.severity) for f in report.findings] == [
        ("jit-first", "scan", "note"),
        ("jit-later", "scan", "error"),
    ]
    assert [row.jit for row in report.calls] == [1, 1, 0]


def test_every_rule_is_of_a_known_kind_and_says_what_to_do():
    for cause, rule in RULES.items():
        assert rule.kind in KINDS, cause
        assert rule.severity in SEVERITIES, cause
        sentence = remedy(cause, "f")
        assert sentence.endswith(".")
        assert "{" not in sentence


def test_functions_of_others_are_given_ours():
    assert "mamba_ops.chunk_gated_delta_rule" in remedy("disable", "chunk_gated_delta_rule")
    assert "mamba_ops.selective_scan" in remedy("pybind", "fwd", "selective_scan_cuda.fwd(u, delta)")


@pytest.mark.parametrize(
    ("guard", "cause", "subject"),
    [
        ("tensor 'x' size mismatch at index 1. expected 128, actual 129", "size", "x.shape[1]"),
        ("tensor 'x' size mismatch at index 0. expected 4, actual 1", "size-one", "x.shape[0]"),
        ("2 <= x.size()[0]", "size-one", "x.shape[0]"),
        ("self.layers[3].steps == 0", "attribute", "self.layers[3].steps"),
        ("mode == 'relu'", "constant", "mode"),
        ("len(self.seen) == 1", "length", "self.seen"),
        ("not self.seen", "length", "self.seen"),
        ("state is None", "type", "state"),
        ("tensor 'x' dtype mismatch. expected Float, actual Double", "dtype", "x"),
    ],
)
def test_guards(guard, cause, subject):
    assert (classify_guard(guard), guard_subject(guard)) == (cause, subject)


def test_assert_one_graph():
    with torch.no_grad():
        report = assert_one_graph(breaks.Quiet(), breaks.x(), shapes=[(4, 8), (5, 8), (7, 8)], dynamic=True)
        assert report.clean
        with pytest.raises(AssertionError, match=r"breaks\.py:\d+ in forward"):
            assert_one_graph(breaks.Branch(), breaks.x())


def test_every_case_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES)
