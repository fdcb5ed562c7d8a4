"""What cannot run here, by the hooks themselves; and the helper for tests of models."""

import contextlib
import gc
import runpy
import signal
import sys
import time
import types
import weakref

import pytest
import torch

from compile_tests.planted import CASES, breaks, guards
from mamba_ops.audit import Report, audit, limit
from mamba_ops.audit.collect import Collector
from mamba_ops.audit.limit import TimeIsUp, at_most
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


@pytest.mark.parametrize(
    ("message", "cause", "op"),
    [
        ("mutated inputs (1 instances). Found from : \n", "capture-input", "the input"),
        ("cpu device (arg0_1). Found from : \n", "capture-host", "cpu device (arg0_1)"),
        ("unsafe op mine::op. Found from : \n", "capture-other", "unsafe op mine::op"),
    ],
)
def test_what_inductor_says_of_cuda_graphs_is_kept(monkeypatch, message, cause, op):
    """Each module of Inductor has the function under its own name; all of them are heard, and put back."""
    from torch._inductor import compile_fx, cudagraph_trees, cudagraph_utils, output_code

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    name = "log_cudagraph_skip_and_bump_counter"
    modules = (compile_fx, cudagraph_trees, cudagraph_utils, output_code)
    before = [getattr(module, name) for module in modules]
    for module in modules:
        report = Report("model")
        with Collector(report).listen():
            getattr(module, name)(f'skipping cudagraphs due to {message}  File "{__file__}", line 3, in f\n')
        [found] = report.findings
        assert (found.kind, found.cause, found.op) == ("capture", cause, op)
        assert (found.where.file, found.where.line) == (__file__, 3)
    assert [getattr(module, name) for module in modules] == before


@pytest.mark.parametrize(("sizes", "cause"), [((4, 6, 12), "size-again"), ((4, 6, 1), "size-one")])
def test_which_end_of_a_range_a_size_is_beyond(sizes, cause):
    """The guard is the same: 2 <= x.size()[0] <= 8."""
    first, *more = (torch.randn(size, 8) for size in sizes)
    with torch.no_grad():
        report = audit(guards.DecidesBySize(), first, calls=[(x,) for x in more])
    assert {finding.cause for finding in report.findings} == {"size", cause}


def test_a_limit_goes_past_except_exception_and_is_over_with_its_block():
    def endless():
        while True:
            with contextlib.suppress(Exception):
                time.sleep(10)

    def first_briefly():
        with contextlib.suppress(TimeIsUp), at_most(0.05):
            endless()
        endless()  # the outer one goes on

    with pytest.raises(TimeIsUp), at_most(0.05):
        endless()
    with pytest.raises(TimeIsUp), at_most(0.1), at_most(10):  # the one that ends first
        endless()
    with pytest.raises(TimeIsUp), at_most(0.3):
        first_briefly()
    with at_most(0.05):
        pass
    time.sleep(0.1)


def test_a_limit_that_is_lost_in_a_destructor_comes_again_and_nothing_is_said(capfd):
    class Slow:
        def __del__(self):
            time.sleep(1)

    def loses_it():
        Slow()
        time.sleep(10)

    hook = sys.unraisablehook
    begin = time.monotonic()
    with pytest.raises(TimeIsUp), at_most(0.1):
        loses_it()
    assert time.monotonic() - begin < 5
    assert sys.unraisablehook is hook
    assert capfd.readouterr().err == ""


def test_a_limit_waits_for_an_import_and_for_the_end_of_a_with_block(tmp_path, monkeypatch):
    class Mode:
        ended = False

        def __enter__(self):
            pass

        def __exit__(self, *_):
            time.sleep(0.2)
            self.ended = True

    def briefly_in(mode):
        with mode:
            pass
        time.sleep(10)

    mode = Mode()
    with pytest.raises(TimeIsUp), at_most(0.1):
        briefly_in(mode)
    assert mode.ended

    (tmp_path / "imported_late.py").write_text("import time\ntime.sleep(0.3)\nwhole = True\n")
    (tmp_path / "imports.py").write_text("import time, imported_late\ntime.sleep(10)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TimeIsUp), at_most(0.1):
        runpy.run_path(str(tmp_path / "imports.py"))
    assert sys.modules.pop("imported_late").whole


def test_a_limit_waits_for_so_long_alone(monkeypatch):
    class Endless:
        def __enter__(self):
            time.sleep(10)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(limit, "_PATIENCE", 0.2)
    begin = time.monotonic()
    with pytest.raises(TimeIsUp), at_most(0.1), Endless():
        pass
    assert time.monotonic() - begin < 5


def test_an_alarm_that_comes_while_it_is_turned_off_is_nobodys(monkeypatch):
    set_timer = signal.setitimer

    def late(which, seconds, interval=0.0):
        set_timer(which, seconds, interval)
        if seconds == 0:
            signal.raise_signal(signal.SIGALRM)

    with monkeypatch.context() as patch:
        patch.setattr(signal, "setitimer", late)
        with at_most(10):
            pass
    left, _ = signal.getitimer(signal.ITIMER_REAL)  # that of whoever runs the tests, if of anybody
    assert left == 0 or left > 1


def test_a_limit_keeps_nothing_alive():
    def holds():
        kept = type("Kept", (), {})()
        with at_most(10):
            return weakref.ref(kept)

    gc.disable()
    try:
        assert holds()() is None
    finally:
        gc.enable()


def test_a_limit_that_somebody_swallows_comes_at_the_end():
    def swallows():
        try:
            time.sleep(10)
        except BaseException:
            return True

    with pytest.raises(TimeIsUp), at_most(0.1):
        assert swallows()


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
        assert_one_graph(breaks.Quiet(), breaks.x(), shapes=[(4, 8), (5, 8), (1, 8)])  # as torch does for any model
        with pytest.raises(AssertionError, match="recompile/size-one"):
            assert_one_graph(breaks.Quiet(), breaks.x(), shapes=[(4, 8), (5, 8), (1, 8)], allow=())
        with pytest.raises(AssertionError, match="recompile/size-again"):
            assert_one_graph(guards.DecidesBySize(), breaks.x(), shapes=[(4, 8), (5, 8), (12, 8)])
        with pytest.raises(AssertionError, match=r"breaks\.py:\d+ in forward"):
            assert_one_graph(breaks.Branch(), breaks.x())


def test_every_case_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES)
