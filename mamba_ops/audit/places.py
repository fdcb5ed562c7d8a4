"""Whose line it is: the frames of a stack that belong to the user, and the modules whose code stands there."""

import functools
import inspect
import os
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mamba_ops.audit.report import Place, function_name

_PACKAGE = Path(__file__).resolve().parents[1]
_OURS = str(_PACKAGE / "audit")
_NOT_THEIRS = (
    str(Path(torch.__file__).parent) + os.sep,
    _OURS + os.sep,
    str(_PACKAGE / "registry") + os.sep,
    str((_PACKAGE / "registry").resolve()) + os.sep,  # a link, in a checkout
    *(str(_PACKAGE / name) for name in ("absent.py", "commands", "testing")),
    str(_PACKAGE / "ops" / "_triton" / "watch.py"),  # stands between every launch and Triton
)
_STANDARD = str(Path(sysconfig.get_paths()["stdlib"]))
_LINE_IN_TEXT = re.compile(r'File "([^"]+)", line (\d+)(?:, in (\S+))?')


class Frame(Protocol):
    """What a frame summary of the traceback module has."""

    filename: str
    name: str
    lineno: int | None


@functools.cache
def is_theirs(file: str) -> bool:
    """Whether a file holds the user's code, or another package's that the user called."""
    if file.startswith("<") or file.startswith(_NOT_THEIRS):
        return False
    path = Path(file)
    if "triton" in path.parts and "site-packages" in path.parts:
        return False
    return not file.startswith(_STANDARD) or "site-packages" in path.parts or "dist-packages" in path.parts


def is_ours(file: str) -> bool:
    """Whether a file is a part of the audit."""
    return file.startswith(_OURS + os.sep)


def theirs(stack: Iterable[Frame]) -> tuple[Place, ...]:
    """Return the frames that are not torch's, outermost first, each line once."""
    places: list[Place] = []
    for frame in stack:
        if frame.lineno is not None and is_theirs(frame.filename):
            place = Place.of(frame.filename, frame.lineno, function_name(frame.name))
            if place not in places:
                places.append(place)
    return tuple(places)


@functools.lru_cache(maxsize=4096)
def in_text(text: str | None) -> tuple[Place, ...]:
    """Return the places of a stack that torch keeps as text, as the nodes of a graph do."""
    found = _LINE_IN_TEXT.findall(text or "")
    return tuple(Place.of(file, int(line), function_name(name)) for file, line, name in found if is_theirs(file))


def running() -> tuple[Place, ...]:
    """Return the user's frames on the stack that calls this."""
    frame: types.FrameType | None = sys._getframe(1)
    places: list[Place] = []
    while frame is not None:
        if is_theirs(frame.f_code.co_filename):
            name = function_name(frame.f_code.co_name)
            places.append(Place.of(frame.f_code.co_filename, frame.f_lineno, name))
        elif places and frame.f_code.co_filename.startswith(_OURS):
            break  # who called the audit did not call this
        frame = frame.f_back
    return tuple(reversed(places))


class Layers:
    """Finds the modules of a model that run a line."""

    def __init__(self, model: Any) -> None:
        self._of_class: dict[type, list[str]] = {}
        self._known: dict[tuple[Place, ...], tuple[str, ...]] = {}
        self._paths: dict[int, str] = {}
        self.forward: Place | None = None  # where the model's own forward is defined
        if isinstance(model, nn.Module):
            code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
            if code is not None:
                self.forward = Place.defined(code)
            for name, module in model.named_modules():
                self._of_class.setdefault(type(module), []).append(name or type(module).__name__)
        self.name(model)

    def name(self, model: Any) -> None:
        """Take note of a model's modules, so that `path` knows them; a copy's too."""
        if isinstance(model, nn.Module):
            self._paths |= {id(module): name for name, module in model.named_modules()}

    def path(self, module: object) -> str:
        """Return the name of a module in the model, "" for the model itself and for others."""
        return self._paths.get(id(module), "")

    def of(self, stack: Iterable[Place]) -> tuple[str, ...]:
        """Return the modules whose code holds the innermost place of a stack that is in any module's code."""
        key = tuple(stack)
        if key not in self._known:
            self._known[key] = self._find(key)
        return self._known[key]

    def _find(self, stack: tuple[Place, ...]) -> tuple[str, ...]:
        for place in reversed(stack):
            found = [
                name
                for cls, names in self._of_class.items()
                if any(place.file == file and place.line in lines for file, lines in _code_of(cls))
                for name in names
            ]
            if found:
                return tuple(found)
        return ()


@functools.cache
def _code_of(cls: type) -> list[tuple[str, range]]:
    return [
        (code.co_filename, range(code.co_firstlineno, max(_lines(code)) + 1))
        for base in cls.__mro__
        if not base.__module__.startswith("torch.")
        for member in vars(base).values()
        for code in [getattr(inspect.unwrap(member) if callable(member) else member, "__code__", None)]
        if isinstance(code, types.CodeType)
    ]


def _lines(code: types.CodeType) -> Iterator[int]:
    yield code.co_firstlineno
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _lines(constant)
    yield from (line for _, _, line in code.co_lines() if line is not None)
