"""What cannot run here, by the hooks themselves; and the helper for tests of models."""

import types

import pytest
import torch

from compile_tests.planted import CASES, breaks, guards
from mamba_ops.audit import Report, audit
from mamba_ops.audit.collect import Collector
from mamba_ops.audit.guards import classify_guard, guard_subject
from mamba_ops.audit.messages import subject_of
from mamba_ops.audit.package_remedies import for_caller, package_of
from mamba_ops.audit.remedies import RULES, classify_break, remedy
from mamba_ops.audit.report import KINDS, SEVERITIES
from mamba_ops.audit.source_locations import SourceLocation
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


def test_every_rule_is_of_a_known_kind_and_says_what_to_do():
    assert RULES
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
        ("mode == 'relu'", "string", "mode"),
        ("num == 3", "number", "num"),
        ("flag == True", "flag", "flag"),
        ("tensor 'x' rank mismatch. expected 1, actual 2", "rank", "x"),
        ("tensor 'x' requires_grad mismatch. expected requires_grad=0", "requires-grad", "x"),
        ("tensor 'x' stride mismatch at index 0. expected 8, actual 1", "strides", "x"),
        (
            "tensor 'x' dispatch key set mismatch. expected DispatchKeySet(CPU), actual DispatchKeySet(CUDA)",
            "dispatch-keys",
            "x",
        ),
        ("expected type of 'x' to be a tensor type, ' but found <class 'int'>", "type", "x"),
        ('Duplicate tensors found: ["s", "x"]', "aliasing", "s, x"),
        ("not ___dict_contains('a', batch)", "keys", "batch"),
        ("x.size()[0] == 33", "size-fixed", "x.shape[0]"),
        ("other.size()[0] == x.size()[0]", "size-again", "other.shape[0]"),
        ("GLOBAL_STATE changed: grad_mode ", "grad-mode", "grad_mode"),
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


def test_a_line_in_a_package_has_a_remedy_for_its_caller():
    own = SourceLocation("/src/train.py", 3, "step", "y = layer(x)")
    package = "/venv/lib/python3.11/site-packages/theirs/layer.py"
    stack = (own, SourceLocation(package, 9, "forward", "self.mix(x)"), SourceLocation(package, 5, "mix", "x.item()"))
    said = for_caller("sync", "item", ".item()", stack)
    assert said.startswith("The line is in theirs: leave forward out of the compiled model at `y = layer(x)`")
    assert "keep self.n the same" in for_caller("recompile", "attribute", "self.n", stack)
    assert for_caller("sync", "item", ".item()", (own,)) is None
    assert for_caller("fallback", "optional-package", "mamba_ssm", stack) is None
    assert package_of("/venv/lib/site-packages/single.py") == "single"


def test_a_line_in_a_package_is_told_by_the_call_that_enters_it_last():
    package, own = "/lib/site-packages/theirs/core.py", "/repo/step.py"
    stack = (
        SourceLocation(own, 9, "main", "trainer.fit(model)"),
        SourceLocation(package, 3, "fit", "step()"),
        SourceLocation(own, 4, "step", "self.log(loss)"),
        SourceLocation(package, 8, "log", "check(name)"),
        SourceLocation(package, 5, "check", "inspect(name)"),
    )
    said = for_caller("break", "compiler-error", "AttributeError", stack)
    assert said.startswith("The line is in theirs: leave log out of the compiled model at `self.log(loss)`")


def test_what_breaks_is_called_as_the_line_calls_it():
    message = "call_method TensorVariable() item"
    assert subject_of("item", message, "y = x + float(s)", "float") == "float()"
    assert subject_of("item", message, "y = x.item()", "x.item") == ".item()"
    assert classify_break("Tensor.tolist() with non-integer tensor", "", "x.tolist()") == "tolist"
    assert classify_break("Unsupported Tensor.backward() call", "", "loss.backward()") == "backward"


def test_remedies_name_what_the_case_has():
    assert "lr=torch.tensor(0.01)" in remedy("hyperparameter", "self.param_groups[0]['lr']")
    assert remedy("attribute", "options.number").startswith("Keep options.number the same")
    assert "buffer" in remedy("attribute", "self.calls")
    assert "mark_dynamic(x, 0), torch._dynamo.mark_dynamic(y.z, 1)" in remedy("size", "x.shape[0], y.z.shape[1]")
    assert remedy("size", "(a value from before the break).shape[0]").startswith("Compile with dynamic=True: ")
