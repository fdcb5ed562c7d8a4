"""Inductor's code for a CPU, read: what each of its kernels stores where, and what lies around our ops.

Kernels are generated and not compiled: what stands for them writes zeros. So a layer takes a second or two.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code

COPY, CAST = "copy", "cast"
_OP = re.compile(r"torch\.ops\.(\w+\.\w+)\.\w+\(")
_NAME = re.compile(r"\b[a-z]\w*\b")


class Around(NamedTuple):
    """What is extra beside an op: a buffer that only repeats another one.

    Attributes:
        op: the op's name.
        where: `before` where the op reads what was copied, `after` where what it returned is copied.
        kind: COPY, or CAST where the dtype changes.
    """

    op: str
    where: str
    kind: str


@dataclass
class Kernel:
    """A generated kernel: its parameters in order, and for each that it writes what the stores are."""

    parameters: list[str]
    stores: dict[str, set[tuple[str, str]]]
    """Parameter to the sources of what is stored there: (a parameter, COPY or CAST), or ("", "") if it is computed."""


@dataclass
class Program:
    """One graph's code."""

    kernels: int = 0
    """How many calls of generated kernels it makes; products of matrices and our ops are others."""
    ops: list[str] = field(default_factory=list)
    around: list[Around] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    """What there should be none of: clones and copies as calls, and ops that were made functional."""


@contextmanager
def _uncompiled() -> Iterator[None]:
    def kernel(_: AsyncCompile, types: list[str], source: str) -> Callable[..., None]:
        def zeros(*arguments: Any) -> None:
            for kind, argument in zip(types, arguments, strict=True):
                if isinstance(argument, torch.Tensor) and not kind.startswith("const"):
                    argument.zero_()

        return zeros

    caches = {"fx_graph_cache": False, "cpp.simdlen": 1}  # what a cache holds is not written again
    with (
        config.patch(caches),
        torch._functorch.config.patch(enable_autograd_cache=False),
        mock.patch.object(AsyncCompile, "cpp_pybinding", kernel),
    ):
        yield


def programs(call: Callable[[], object]) -> list[Program]:
    """Return what a call of something compiled makes Inductor write: a program for each graph."""
    with _uncompiled():
        _, codes = run_and_get_code(call)
    return [read(code) for code in codes]


def read(code: str) -> Program:
    """Read a module that Inductor wrote."""
    kernels = {
        name: _kernel(source)
        for name, source in re.findall(r"^(\w+) = async_compile\.cpp_pybinding\(.*?r'''(.*?)'''", code, re.M | re.S)
    }
    lines = [line.strip() for line in code[code.index("def call(") :].splitlines()]
    lines = lines[: next((i for i, line in enumerate(lines) if line.startswith("return (")), len(lines))]
    program = Program()
    same: dict[str, str] = {}  # a name to the name of the memory that it is a view of
    written: dict[str, set[tuple[str, str]]] = {}  # memory to the sources of what generated kernels stored there
    by_op: dict[str, str] = {}  # what an op returned, to its name
    around: list[Around] = []

    def memory(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    for line in lines:
        program.words += [word for word in (".copy_(", ".clone(", "auto_functionalized") if word in line]
        if alias := re.match(r"(\w+) = (?:reinterpret_tensor\()?(\w+)(?:\[\d+\])?(?:$|;|,| )", line):
            source = memory(alias[2])
            if "[" in line.partition("(")[0]:  # one of several that an op returned
                by_op[alias[1]] = by_op.get(source, "")
            elif source not in ("empty_strided_cpu", "torch") and "# reuse" not in line:
                same[alias[1]] = source
        name, _, rest = line.partition("(")
        if name in kernels:
            program.kernels += 1
            given = [memory(argument.strip()) for argument in _arguments(rest)]
            by_parameter = dict(zip(kernels[name].parameters, given, strict=False))
            for parameter, stores in kernels[name].stores.items():
                target = by_parameter[parameter]
                for source, kind in stores:
                    origin = by_parameter.get(source, "")
                    written.setdefault(target, set()).add((origin, kind))
                    if kind and origin in by_op and by_op[origin]:
                        around.append(Around(by_op[origin], "after", kind))
        elif call := _OP.search(line):
            if not call[1].startswith(("mamba_ops.", "planted_strides.")):
                continue
            op = call[1].rpartition(".")[2]
            program.ops.append(op)
            result = line.partition(" = ")[0] if " = torch.ops" in line else ""
            for argument in sorted({memory(found) for found in _NAME.findall(line[call.end() :])} & written.keys()):
                kinds = {kind for _, kind in written[argument]}
                if "" not in kinds:
                    around.append(Around(op, "before", CAST if CAST in kinds else COPY))
            if result:
                by_op[result] = op
            elif given := re.search(r"\boutput=(?:reinterpret_tensor\()?(\w+)", line):
                by_op[memory(given[1])] = op
    program.around = around
    return program


def _arguments(text: str) -> list[str]:
    """Return the arguments of a call, its opening bracket gone; generated kernels take names and sizes alone."""
    return text.rpartition(")")[0].split(",")


def _kernel(source: str) -> Kernel:
    """Follow each number that a kernel stores back to where it was loaded."""
    header, _, body = source[source.index('extern "C"') :].partition("{")
    parameters = re.findall(r"(\w+)\s*[,)]", header[header.index("(") :])
    origin: dict[str, tuple[str, str]] = {}
    pointers: dict[str, str] = {}  # to the parameter that it is another name of
    stores: dict[str, set[tuple[str, str]]] = {}
    for line in body.splitlines():
        line = line.strip()
        if found := re.match(r"auto (\w*ptr\d+) = (\w*ptr\d+);$", line):
            pointers[found[1]] = found[2]
        elif found := re.match(r"auto (\w+) = (.*);$", line):
            origin[found[1]] = _origin(found[2], origin)
        elif found := re.match(r"(\w*ptr\d+)\[.*\] = (.*);$", line):
            stores.setdefault(pointers.get(found[1], found[1]), set()).add(_origin(found[2], origin))
    return Kernel(parameters, stores)


def _origin(expression: str, known: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Return the parameter that an expression only repeats, and whether its dtype changes on the way."""
    cast = False
    while found := re.fullmatch(r"(?:c10::convert|static_cast)<([\w:]+)>\((.*)\)", expression):
        cast, expression = True, found[2]
    if found := re.fullmatch(r"(\w*ptr\d+)\[.*\]", expression):
        return found[1], CAST if cast else COPY
    source, kind = known.get(expression, ("", ""))
    return source, (CAST if cast and kind else kind)
