"""What an audit could miss: torch's own frames, code of exec, first calls, errors, what a break hides."""

import gc
import importlib.util
import threading

import pytest
import torch
from torch import nn

from compile_tests.planted import breaks, unseen
from mamba_ops.audit import answers, audit, watch

x = breaks.x


def severe(report):
    return [(f.kind, f.cause) for f in report.findings if f.severity != "note"]


def stepping(lr, backend="aot_eager"):
    """Compile an optimizer's step, and make it with other learning rates."""
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    optimizer = torch.optim.SGD([weight], lr=lr(0), foreach=False)
    step = torch.compile(optimizer.step, backend=backend)
    for i in range(12):
        if isinstance(optimizer.param_groups[0]["lr"], torch.Tensor):
            optimizer.param_groups[0]["lr"].fill_(0.01 * i)
        else:
            optimizer.param_groups[0]["lr"] = lr(i)
        step()  # planted


def test_a_compiled_step_recompiles_at_the_line_that_calls_it():
    torch.compiler.reset()
    with watch() as report:
        stepping(lambda i: 0.01 * (i + 1))
    assert set(severe(report)) == {("recompile", "hyperparameter"), ("recompile", "limit")}
    assert all(f.where.file == __file__ and "# planted" in f.where.source for f in report.findings)


def test_a_rate_that_became_dynamic_is_a_note():
    torch.compiler.reset()
    with watch() as report:
        stepping(lambda i: 0.01 * (i + 1), "eager")
    assert severe(report) == []
    assert [f.count for f in report.findings if f.cause == "number"] == [1]


@pytest.mark.slow
def test_a_compiled_step_with_its_rate_as_a_tensor_is_clean():
    torch.compiler.reset()
    with watch() as report:
        stepping(lambda i: torch.tensor(0.01 * (i + 1)))
    assert severe(report) == []


@pytest.mark.slow
def test_modules_of_torch_as_the_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    report = audit(model, torch.ones(4, 8), calls=[(torch.ones(n, 8),) for n in (5, 1)])
    assert severe(report) == [("recompile", "size-one")]
    assert report.findings[0].where.function == "forward"
    assert audit(model, torch.ones(4, 8)).findings == []


BRANCH = "def f(x):\n    if x.sum() > 0:\n        return x\n    return -x"
STRAIGHT = "def f(x):\n    return -x"


def made_by_exec(source):
    namespace = {}
    exec(source, namespace)
    return namespace["f"]


def test_code_without_a_file_is_told_by_its_name_and_who_called_it():
    torch.compiler.reset()
    with watch() as report:
        torch.compile(made_by_exec(BRANCH), backend="eager")(torch.ones(3))  # planted
    [finding] = report.findings
    assert (finding.cause, str(finding.where), finding.where.function) == ("branch", "<string>:2", "f")
    assert "# planted" in finding.stack[-2].source
    torch.compiler.reset()  # torch 2.11 has one wrapper around all code without a file, and compiles it again
    with watch() as report:
        torch.compile(made_by_exec(STRAIGHT), backend="eager")(torch.ones(3))
    assert report.findings == []


class Changing(nn.Module):
    """Changes each kind of attribute, as one may in a first call."""

    def __init__(self, held=None):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()))
        self.other, self._cached, self.pair, self.history = torch.zeros(()), None, (1, 2), [0]
        self.held = held

    def forward(self, x):
        self.seen += 1
        self.other.add_(1)
        self._cached, self.pair, self.late = x.shape, (3, 4), 1
        self.history.append(1)
        self.seen.requires_grad_()
        return x * self.scale


@pytest.mark.parametrize("held", [None, threading.Lock()], ids=["copied", "not copied"])
def test_the_model_is_as_it_was(held):
    model = Changing(held)
    before = {**vars(model)}
    report = audit(model, torch.ones(3))
    assert vars(model).keys() == before.keys()
    assert (model._cached, model.pair, model.history) == (None, (1, 2), [0])
    assert (model.seen.item(), model.other.item(), model.seen.requires_grad) == (0, 0, False)
    assert any("cannot be copied (TypeError" in note for note in report.notes) == (held is not None)


def test_a_function_that_reaches_a_model_is_told():
    model = Changing()
    report = audit(lambda x: model(x), torch.ones(3))
    assert any("a function reaches it by name" in note for note in report.notes)
    assert (model._cached, model.history, model.seen.item()) == (None, [0], 0)


def fails(module, inputs):
    raise KeyError("an error of the compiler")


def halved(x):
    return x / 2


def test_errors_of_the_compiler_are_findings_at_the_users_line():
    torch.compiler.reset()
    with watch() as report, pytest.raises(Exception, match="an error of the compiler"):
        torch.compile(halved, backend=fails)(torch.ones(3))  # planted
    [finding] = report.findings
    assert (finding.cause, finding.breaks) == ("compiler-error", True)
    assert finding.where.function in ("halved", "test_errors_of_the_compiler_are_findings_at_the_users_line")
    assert "an error of the compiler" in finding.message


@pytest.mark.slow
def test_errors_that_torch_passes_over_are_findings_too():
    torch.compiler.reset()
    with watch() as report, torch._dynamo.config.patch(suppress_errors=True):
        torch.compile(halved, backend=fails)(torch.ones(3))
        torch.compile(halved, backend="eager")(torch.ones(3))
    assert severe(report) == [("break", "compiler-error")]


def test_what_a_break_in_a_loop_hides_is_found_in_the_same_run():
    more = [(torch.randn(4, 8),) for _ in range(2)]
    with torch.no_grad():
        report = audit(unseen.Loop(), x(), calls=more)
    hiding = next(n for n, f in enumerate(report.findings, 1) if f.skipped_frame)
    assert report.findings[hiding - 1].cause == "item"
    behind = {(f.cause, f.op, f.where.function) for f in report.findings if f.behind == hiding}
    assert behind == {("dynamic-shape", "aten.nonzero", "forward"), ("attribute", "self.calls", "forward")}
    assert {f.behind for f in report.findings} == {None, hiding}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layer", "causes"),
    [
        (unseen.LoopTwin, unseen.Scaled, {"item", "attribute"}),  # of the layers: nothing is behind
        (unseen.LoopTwin, unseen.ScaledTwin, set()),
        (unseen.Loop, unseen.ScaledTwin, {"dynamic-shape", "attribute"}),  # all is in sight
    ],
)
def test_nothing_else_is_behind(model, layer, causes):
    more = [(torch.randn(4, 8),) for _ in range(2)]
    with torch.no_grad():
        report = audit(model(layer), x(), calls=more)
    found = {f.cause for f in report.findings if f.severity != "note" and "before the break" not in f.op}
    assert causes <= found <= causes | {"length"}
    assert all(f.behind is None for f in report.findings)


@pytest.mark.slow  # thaws, collects and freezes all that the tests' process has
def test_what_is_hidden_is_found_among_frozen_functions() -> None:
    """Servers freeze what they have before they fork; then the collector lists none of it."""
    gc.collect()
    gc.freeze()
    try:
        with torch.no_grad():
            report = audit(unseen.InTry(), x())
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    assert {f.cause for f in report.findings} == {"item", "print"}


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (unseen.InTry, "item"),
        pytest.param(unseen.InWith, "item", marks=pytest.mark.slow),
        pytest.param(unseen.InGenerator, "item", marks=pytest.mark.slow),
        pytest.param(unseen.AfterError, "compiler-error", marks=pytest.mark.slow),
    ],
)
def test_what_other_breaks_hide_is_found_too(model, cause):
    code = model.forward.__code__
    with torch.no_grad():
        report, twin = audit(model(), x()), audit(model(quiet=True), x())
    hiding = next(n for n, f in enumerate(report.findings, 1) if f.hides)
    assert {(f.cause, f.behind) for f in report.findings} == {(cause, None), ("print", hiding)}
    assert [(f.cause, f.behind) for f in twin.findings] == [(cause, None)]
    assert model.forward.__code__ is code  # which ran otherwise meanwhile


HAS_TYPER = importlib.util.find_spec("typer") is not None


def test_who_is_told_that_an_absent_device_is_there():
    """The user's code is; torch itself would go on to the device."""
    kind = next(name for name in ("cuda", "xpu") if not torch.get_device_module(name).is_available())
    device, module = torch.device(kind), torch.get_device_module(kind)
    before = module.is_available
    with answers.present(device), answers.on_host(device):
        assert (module.is_available(), module.device_count(), module.current_device()) == (True, 1, 0)
        assert module.get_device_capability()
        assert torch.accelerator.current_accelerator() == device
        assert torch.ones(2, device=kind).to(kind).device.type == "cpu"
        assert nn.Linear(2, 2).to(device).weight.device.type == "cpu"
        torch.manual_seed(0)  # asks in torch's own code
    assert module.is_available is before


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TYPER, reason="the command needs mamba-ops[cli]")
@pytest.mark.parametrize("factory", ["asks", "asks_twin"])
def test_an_absent_device_answers_and_the_trace_goes_on(tmp_path, factory):
    from mamba_ops.audit.report import Report
    from mamba_ops.commands.audit.child import run_in_child
    from mamba_ops.commands.audit.target import Options

    device = next(name for name in ("cuda", "xpu") if not torch.get_device_module(name).is_available())
    report = Report(factory, device)
    run_in_child(Options(f"compile_tests.planted.unseen:{factory}", device), report)
    if factory == "asks_twin":
        assert report.findings == []
        return
    assert [f.cause for f in report.findings] == ["item", "dynamic-shape", "assumed-values", "assumed-values"]
    assert "taken to be 1" in report.findings[-1].message
    assert all(f.where.file == unseen.__file__ for f in report.findings)
