"""Comparing a model on several backends, and finding the model by what the user wrote."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mamba_ops
from mamba_ops import causal_conv1d_update
from mamba_ops.commands import targets
from mamba_ops.commands.compare.comparison import Comparison, Row, compare
from mamba_ops.commands.targets import TargetError, load_target
from mamba_ops.ops._cpp import build
from mamba_ops.registry import Backend, UnknownNameError

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "without_inductor")
CPU = torch.device("cpu")

FACTORY = """
import torch
from mamba_ops import causal_conv1d_update

class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(8, 6, 3))
        self.weight = torch.nn.Parameter(torch.ones(6, 4))

    def forward(self, x):
        return causal_conv1d_update(x, self.state, self.weight) + 1

def make():
    return Conv(), [torch.randn(3, 6), torch.randn(5, 6)]

def fails():
    return 1 / 0

def wrong():
    return Conv(), 3

def alone():
    return Conv()
"""


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile in a second: what is looked at is what is counted."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile(*args, **{**options, "backend": "eager"}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "users_model.py"
    path.write_text(FACTORY)
    return path


@pytest.fixture
def other():
    """A backend that is off by 0.5, and takes no more than four rows."""
    backend = Backend("other", devices=None, priority=-50)
    kernel = causal_conv1d_update.kernels["torch"].function

    def shifted(
        x: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        slots: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_accepted_tokens: Tensor | None = None,
        silu: bool = True,
        null_slot: int = -1,
        output: Tensor,
    ) -> None:
        kernel(x, conv_state, weight, bias, silu=silu, output=output)
        output.add_(0.5)

    backend.implements(causal_conv1d_update, unsupported=lambda x: "takes at most 4 rows" if len(x) > 4 else None)(
        shifted
    )
    yield backend.name
    backend.remove()


# -- comparing --------------------------------------------------------------------------------------------------------


def test_the_package_has_the_function() -> None:
    assert mamba_ops.compare is compare


def test_a_model_of_a_file(file: Path) -> None:
    comparison = compare(f"{file}:make", ["torch"])
    [row] = comparison.rows
    assert (row.backend, row.refusal, row.recompiles, row.kernel_calls) == ("torch", None, 0, {"torch": 2})
    assert min(row.eager_ms, row.compiled_ms) > 0
    assert (comparison.calls, comparison.graphs, comparison.problems) == (2, 1, [])


def test_a_backend_that_computes_something_else(file: Path, other: str) -> None:
    model, inputs = load_model(file)
    comparison = compare((model, inputs[0]), ["torch", other.upper()])
    assert comparison.rows[1].kernel_calls == {other: 1}
    assert comparison.rows[1].difference == pytest.approx(0.5)
    assert comparison.graphs == 1
    [problem] = comparison.problems
    assert problem.startswith("other: an output is 0.5 off, expected at most 0.0")


def test_the_caches_are_put_back(file: Path) -> None:
    model, inputs = load_model(file)
    compare((model, inputs), ["torch"])
    assert not model.state.any()


def test_a_backend_that_refuses(file: Path, other: str) -> None:
    comparison = compare(f"{file}:make", ["torch", other])
    assert comparison.rows[1] == Row("other", refusal="takes at most 4 rows")
    assert comparison.problems == []
    assert compare(f"{file}:make", [other]).problems == ["no backend takes this model's calls"]


def test_all_backends_of_the_device_unasked(file: Path, other: str) -> None:
    built = [] if build.why_no_compiler() else ["cpp"]
    assert [row.backend for row in compare(f"{file}:make").rows] == ["torch", *built, other]


def test_an_unknown_backend(file: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown backend 'nope'"):
        compare(f"{file}:make", ["torch", "nope"])


def test_a_model_without_ops_of_ours() -> None:
    comparison = compare((nn.Linear(2, 2), torch.ones(1, 2)), ["torch"])
    assert comparison.problems == ["the model calls no op of mamba_ops, expected one at least"]


def test_a_model_that_fails_is_the_users(file: Path) -> None:
    with pytest.raises(TargetError, match="the model raised RuntimeError on torch") as raised:
        compare((nn.Linear(2, 2), torch.ones(1, 3)), ["torch"])
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_a_model_of_transformers() -> None:
    pytest.importorskip("transformers")
    model = targets.transformers_model("mamba2", CPU, layers=1, width=32)
    calls = [{"input_ids": torch.arange(length)[None], "use_cache": False} for length in (21, 34)]
    comparison = compare((model, calls), ["torch"])
    assert comparison.rows[0].kernel_calls == {"torch": 4}
    assert (comparison.graphs, comparison.problems) == (1, [])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"difference": math.nan}, "b: an output is nan off, expected at most 0.1"),
        ({"recompiles": 2}, "b: 2 recompiles after the first backend's, expected none"),
    ],
)
def test_a_comparison_says_what_is_wrong(change: dict[str, float], sentence: str) -> None:
    good = Row("a", None, 1.0, 1.0, 0.0, 3, {"a": 1})
    bad = dataclasses.replace(good, backend="b", recompiles=0)
    assert Comparison((good, bad), "here", 1, 1, 10.0).problems == []
    assert Comparison((good, dataclasses.replace(bad, **change)), "here", 1, 1, 10.0).problems == [sentence]


# -- targets ----------------------------------------------------------------------------------------------------------


def load_model(file: Path):
    target = load_target(f"{file}:make", CPU)
    return target.model, [call.args for call in target.calls]


def test_a_model_of_a_module(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    target = load_target("users_model:make", CPU)
    assert [tuple(call.args[0].shape) for call in target.calls] == [(3, 6), (5, 6)]
    assert not target.model.training


@pytest.mark.parametrize(
    ("inputs", "args", "kwargs"),
    [(3.0, (3.0,), {}), ((1, 2.0), (1, 2.0), {}), ({"x": 4.0}, (), {"x": 4.0})],
    ids=["tensor", "tuple", "dict"],
)
def test_inputs_of_each_form(inputs: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    inputs = torch.tensor(inputs) if isinstance(inputs, float) else inputs
    [call] = targets.as_target((nn.Identity(), inputs), "it", CPU).calls
    assert call.on(lambda *args, **kwargs: (args, kwargs)) == (args, kwargs)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("nowhere", "got nowhere, expected package.module:factory, file.py:factory, "),
        ("nowhere:make", "there is no module nowhere"),
        ("nofile.py:make", "there is no file nofile.py"),
        ("{file}:absent", "has no function absent"),
        ("{file}:fails", ":fails raised ZeroDivisionError"),
        ("{file}:wrong", "got inputs of type int, expected a tensor, a tuple, a dict, or a list of these"),
        ("{file}:alone", "got Conv, expected (model, inputs)"),
        ("transformers:llama", "got llama, expected mamba2, or a folder with a checkpoint"),
        ("transformers:{folder}", "there is no config.json in "),
    ],
)
def test_what_is_no_target(file: Path, what: str, sentence: str) -> None:
    if what.startswith("transformers"):
        pytest.importorskip("transformers")
    with pytest.raises(TargetError) as raised:
        load_target(what.format(file=file, folder=file.parent), CPU)
    assert sentence in str(raised.value)


def test_a_file_that_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_the_kind")
    with pytest.raises(TargetError, match=r"broken.py raised ModuleNotFoundError") as raised:
        load_target(f"{path}:make", CPU)
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


def test_layers_are_for_random_weights(file: Path) -> None:
    with pytest.raises(TargetError, match=r"got 2 layers for .*, expected them for transformers:mamba2 alone"):
        load_target(f"{file}:make", CPU, layers=2)


def test_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TargetError, match=r"pip install 'mamba-ops\[transformers\]'"):
        load_target("transformers:mamba2", CPU)
