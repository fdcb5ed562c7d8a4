"""The table of planted cases: what is wrong, the class a finding must have, a clean twin."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compile_tests.planted import breaks, guards, ops, recompiles, unseen
from compile_tests.planted.breaks import x

MARK = "# planted"
Calls = list[tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One defect and its twin.

    Attributes:
        name: what it is called in tests.
        kind, cause: of the finding that names the defect.
        model, twin: what makes the two; the twin takes `twin_calls`.
        calls: what the model is called with, one call after the other.
        options: what `audit` is given besides.
    """

    name: str
    kind: str
    cause: str
    model: Callable[[], nn.Module]
    twin: Callable[[], nn.Module]
    calls: Callable[[], Calls] = lambda: [(x(),)]
    twin_calls: Callable[[], Calls] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def where(self) -> tuple[str, int]:
        """The file and the line that the finding has to name."""
        made = self.model() if not isinstance(self.model, type) else None
        cls = self.model if isinstance(self.model, type) else getattr(made, "planted_in", type(made))
        lines, first = inspect.getsourcelines(cls)
        marked = [first + i for i, line in enumerate(lines) if MARK in line]
        assert len(marked) == 1, cls
        return str(Path(inspect.getsourcefile(cls) or "")), marked[0]


def rows(*sizes: int) -> Callable[[], Calls]:
    """Calls with inputs of these many rows."""
    return lambda: [(torch.randn(n, 8),) for n in sizes]


def with_each(*others: Any) -> Callable[[], Calls]:
    """Calls with a second argument each."""
    return lambda: [(x(), other) for other in others]


def deep() -> nn.Module:
    """48 layers with the same break."""
    model = breaks.Deep()
    model.planted_in = breaks.LayerWithBreak  # type: ignore[assignment]
    return model


def tensors(*values: Any) -> list[Tensor]:
    """Tensors of these."""
    return [torch.tensor(value) for value in values]


def same_or_not() -> Calls:
    """Two tensors, then one twice."""
    one = x()
    return [(x(), x()), (one, one)]


def keywords(*names: str) -> Callable[[], Calls]:
    """Calls with these keyword arguments, one a call; "" is none."""
    return lambda: [(x(), {name: torch.tensor(2.0)} if name else {}) for name in names]


B, G, K, R, U = breaks, guards, ops, recompiles, unseen
CASES = [
    Case("item", "sync", "item", B.Item, B.ItemTwin),
    Case("item inside a call", "sync", "item", B.ItemInside, B.ItemInsideTwin),
    Case("what comes after it", "break", "rest-of-line", B.ItemInside, B.ItemInsideTwin),
    Case("tolist", "sync", "tolist", B.Tolist, B.TolistTwin, with_each(torch.tensor([3, 2]))),
    Case("nonzero", "sync", "dynamic-shape", B.Nonzero, B.NonzeroTwin),
    Case("boolean mask", "sync", "dynamic-shape", B.Mask, B.MaskTwin),
    Case("repeat_interleave", "sync", "dynamic-shape", B.Repeats, B.RepeatsTwin, with_each(torch.tensor([2, 2, 2, 2]))),
    Case("unique", "sync", "dynamic-shape", B.Unique, B.UniqueTwin),
    Case("branch", "sync", "branch", B.Branch, B.BranchTwin),
    Case("print", "break", "print", B.Print, B.Quiet),
    Case("logger", "break", "logging", B.Logger, B.Quiet),
    Case("clock", "break", "builtin", B.Clock, B.Quiet),
    Case("deepcopy", "break", "skipped-function", B.DeepCopy, B.DeepCopyTwin),
    Case("pybind", "kernel", "pybind", B.Pybind, B.Quiet),
    Case("disable", "kernel", "disable", B.Disabled, B.DisabledTwin),
    Case("data_ptr", "break", "data-pointer", B.DataPointer, B.Quiet),
    Case("explicit", "break", "explicit", B.Explicit, B.Quiet),
    Case("context manager", "break", "context-manager", B.Lock, B.Quiet),
    Case("backward hook", "break", "hook", B.BackwardHook, B.Quiet, options={"train": True}),
    Case("out=", "break", "out-argument", B.OutArgument, B.OutTwin),
    Case("unrolled", "fallback", "unrolled", B.Unrolled, B.UnrolledTwin, rows(32)),
    Case("loop", "break", "explicit", B.LoopWithBreak, B.LoopTwin),
    Case("deep", "kernel", "disable", deep, B.LoopTwin),
    Case("made in the first call", "sync", "tolist", U.Table, U.TableTwin),
    Case("after torch.cond", "break", "print", U.Cond, U.CondTwin),
    Case("no fake", "kernel", "no-fake", K.NoFake, K.WithFake),
    Case("hidden mutation", "kernel", "hidden-mutation", K.Hidden, K.Told),
    Case("alias", "kernel", "alias", K.Alias, K.WithFake),
    Case(
        "autograd.Function", "kernel", "autograd-function", K.AutogradFunction, K.AutogradTwin, options={"train": True}
    ),
    Case("cache on a view", "copy", "mutated-input", K.CacheInPlaceOnView, K.CacheTwin, options={"copies": True}),
    Case("counter", "recompile", "attribute", G.Counter, G.CounterTwin, rows(4, 4, 4)),
    Case(
        "int argument",
        "recompile",
        "constant",
        G.IntArgument,
        G.IntTwin,
        with_each(1, 2, 3),
        with_each(*tensors(1, 2, 3)),
    ),
    Case(
        "text", "recompile", "string", G.Text, G.TextTwin, with_each("relu", "tanh"), with_each(*tensors(True, False))
    ),
    Case("growing list", "recompile", "length", G.Growing, G.GrowingTwin, rows(4, 4, 4)),
    Case("size 1", "recompile", "size-one", G.SizeOne, B.Quiet, rows(4, 7, 1), rows(4, 7, 5)),
    Case("decides by size", "recompile", "size-again", G.DecidesBySize, G.DecidesBySizeTwin, rows(4, 6, 12)),
    Case(
        "recompile limit",
        "recompile",
        "limit",
        G.Text,
        G.TextTwin,
        with_each("relu", *(f"activation {i}" for i in range(9))),
        with_each(*tensors(*(i % 2 == 0 for i in range(10)))),
    ),
    Case("dtype", "recompile", "dtype", G.Dtype, B.Quiet, lambda: [(x(),), (x().double(),)], rows(4, 4)),
    Case(
        "None, then a tensor",
        "recompile",
        "type",
        G.NoneThenTensor,
        G.AlwaysTensor,
        with_each(None, torch.zeros(8)),
        with_each(torch.zeros(8), torch.ones(8)),
    ),
    Case("int that is dynamic", "recompile", "number", R.Repeats, R.Repeats, with_each(*range(3, 10)), with_each(3, 3)),
    Case("int from 1", "recompile", "number", R.Repeats, R.Repeats, with_each(1, 2, 3), with_each(2, 2)),
    Case("float", "recompile", "number", R.Scale, R.ScaleTwin, with_each(2.5, 3.5), with_each(*tensors(2.5, 3.5))),
    Case("flag", "recompile", "flag", R.Flag, R.FlagTwin, with_each(True, False), with_each(*tensors(True, False))),
    Case(
        "three strings",
        "recompile",
        "string",
        G.Text,
        G.TextTwin,
        with_each("relu", "tanh", "none"),
        with_each(*tensors(True, False)),
    ),
    Case("enum", "recompile", "identity", R.ByEnum, B.Quiet, with_each(*R.Mode), rows(4, 4)),
    Case(
        "function",
        "recompile",
        "identity",
        R.ByFunction,
        R.ByFunctionTwin,
        with_each(torch.relu, torch.tanh),
        with_each(torch.relu, torch.tanh),
    ),
    Case("rank", "recompile", "rank", R.AnyRank, R.AnyRank, lambda: [(x(),), (torch.randn(2, 4, 8),)], rows(4, 4)),
    Case(
        "gradient",
        "recompile",
        "requires-grad",
        R.AnyRank,
        R.AnyRank,
        lambda: [(x(),), (x().requires_grad_(),)],
        rows(4, 4),
    ),
    Case(
        "memory format",
        "recompile",
        "strides",
        R.AnyRank,
        R.AnyRank,
        lambda: [(image,) for image in (torch.randn(2, 3, 4, 8), torch.randn(2, 4, 8, 3).permute(0, 3, 1, 2))],
        rows(4, 4),
    ),
    Case("one tensor twice", "recompile", "aliasing", R.TwoTensors, R.TwoTensors, same_or_not, with_each(x(), x())),
    Case(
        "keyword arguments",
        "recompile",
        "keywords",
        R.Keywords,
        R.KeywordsTwin,
        keywords("", "scale"),
        keywords("scale", "scale"),
    ),
    Case(
        "keys of a dict",
        "recompile",
        "keys",
        R.Batch,
        R.BatchTwin,
        lambda: [({"x": x()},), ({"x": x(), "bias": x()},)],
    ),
    Case(
        "list of tensors",
        "recompile",
        "length",
        R.Items,
        R.ItemsTwin,
        lambda: [(x(), [x()] * 0), (x(), [x()]), (x(), [x(), x()])],
        with_each(torch.randn(2, 4, 8), torch.randn(2, 4, 8)),
    ),
    Case(
        "tensor, then a number",
        "recompile",
        "type",
        R.NumberOrTensor,
        R.NumberOrTensor,
        with_each(torch.tensor(2.0), 3),
        with_each(*tensors(2.0, 3.0)),
    ),
    Case("loop over a length", "recompile", "size-fixed", R.OverLength, R.OverLengthTwin, rows(4, 5, 6), rows(4, 5, 6)),
    Case("lookup by a size", "recompile", "size-fixed", R.ByTable, B.Quiet, rows(4, 5, 6), rows(4, 5, 6)),
    Case("divides a size", "recompile", "size-again", R.Divides, B.Quiet, rows(4, 6, 7), rows(4, 6, 7)),
    Case(
        "compares two sizes",
        "recompile",
        "size-again",
        R.SameLength,
        R.SameLengthTwin,
        lambda: [(torch.randn(a, 8), torch.randn(b, 8)) for a, b in ((4, 4), (6, 6), (6, 7))],
    ),
    Case("text attribute", "recompile", "attribute", R.TextAttribute, R.TextAttributeTwin, rows(4, 4), rows(4, 4)),
    Case("second call of a line", "kernel", "disable", R.SecondCall, R.SecondCallTwin),
    Case(
        "strides", "recompile", "strides", G.Contiguity, B.Quiet, lambda: [(x(),), (torch.randn(8, 4).t(),)], rows(4, 4)
    ),
]
