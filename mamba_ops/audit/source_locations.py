"""Lines of code: which frames of a stack are the user's code, and which modules of a model run a line."""

import dataclasses
import functools
import inspect
import linecache
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

_PACKAGE = Path(__file__).resolve().parents[1]
_AUDIT = str(_PACKAGE / "audit") + os.sep
_NOT_USER_CODE = (
    str(Path(torch.__file__).parent) + os.sep,
    _AUDIT,
    str(_PACKAGE / "registry") + os.sep,
    str((_PACKAGE / "registry").resolve()) + os.sep,  # a link, in a checkout
    *(str(_PACKAGE / name) for name in ("commands", "testing")),
    *(str(_PACKAGE / "ops" / "_triton" / name) for name in ("_triton.py", "watch.py")),  # between a launch and Triton
)
_MADE_BY_OTHERS = "<frozen ", "<eval_with_key>", "<lambdifygenerated", "<unknown", "<built-in", "<torch", "<mamba_ops::"
_CALLS_THE_MODEL = str(_PACKAGE / "audit" / "run.py"), str(_PACKAGE / "commands") + os.sep
_STANDARD = str(Path(sysconfig.get_paths()["stdlib"]))
_MIXER = re.compile(
    r"(Mixer|Attention|Attn|DeltaNet|ShortConv(olution)?|RecurrentBlock|MambaLayer|LSTMLayer|Retention|Mamba[123]?)$"
)
_LINE_IN_TEXT = re.compile(r'File "([^"]+)", line (\d+)(?:, in (\S+))?')


def function_name(name: str) -> str:
    """Return the original function's name where Dynamo compiled the rest of one after a break under another name."""
    return re.sub(r"torch_dynamo_resume_in_(.+)_at_\d+", r"\1", name)


@dataclasses.dataclass(frozen=True)
class SourceLocation:
    """A line of code."""

    file: str
    line: int
    function: str = ""
    source: str = ""

    @classmethod
    def of(cls, file: str, line: int, function: str = "") -> "SourceLocation":
        """Return the location with its source line, if that can be read."""
        return cls(file, line, function, linecache.getline(file, line).strip())

    @classmethod
    def defined(cls, code: types.CodeType) -> "SourceLocation":
        """Return the line of a function's `def`; a code object's first line is that of the first decorator.

        The rest of a function after a break begins at a line inside, below the `def`.
        """
        name = function_name(code.co_name)
        if name != code.co_name:
            for line in range(code.co_firstlineno, 0, -1):
                if re.match(rf"\s*(async )?def {re.escape(name)}\b", linecache.getline(code.co_filename, line)):
                    return cls.of(code.co_filename, line, name)
        last = max((line for _, _, line in code.co_lines() if line is not None), default=code.co_firstlineno)
        for line in range(code.co_firstlineno, last + 1):
            if linecache.getline(code.co_filename, line).lstrip().startswith(("def ", "async def ")):
                return cls.of(code.co_filename, line, name)
        return cls.of(code.co_filename, code.co_firstlineno, name)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Frame(Protocol):
    """The attributes of `traceback.FrameSummary` that are read here."""

    filename: str
    name: str
    lineno: int | None


@functools.cache
def is_user_code(file: str) -> bool:
    """Whether a file holds the user's code, or code of a package that the user called."""
    if file.startswith(_NOT_USER_CODE) or file.startswith(_MADE_BY_OTHERS):
        return False
    if has_no_file(file):
        return True
    path = Path(file)
    if "triton" in path.parts and "site-packages" in path.parts:
        return False
    return not file.startswith(_STANDARD) or "site-packages" in path.parts or "dist-packages" in path.parts


def has_no_file(file: str) -> bool:
    """Whether code was made in the process, by exec, a prompt or a dataclass, and is in no file."""
    return file.startswith("<")


def is_audit_code(file: str) -> bool:
    """Whether a file is a part of the audit."""
    return file.startswith(_AUDIT)


def user_frames(stack: Iterable[Frame]) -> tuple[SourceLocation, ...]:
    """Return the locations in a stack that are user code, outermost first, each line once."""
    locations: list[SourceLocation] = []
    for frame in stack:
        if frame.lineno is not None and is_user_code(frame.filename):
            location = SourceLocation.of(frame.filename, frame.lineno, function_name(frame.name))
            if location not in locations:
                locations.append(location)
    return tuple(locations)


@functools.lru_cache(maxsize=4096)
def locations_in_text(text: str | None) -> tuple[SourceLocation, ...]:
    """Return the user code in a stack that torch keeps as text, as it does for the nodes of a graph."""
    frames = _LINE_IN_TEXT.findall(text or "")
    return tuple(
        SourceLocation.of(file, int(line), function_name(name)) for file, line, name in frames if is_user_code(file)
    )


def guard_location(text: str, code: types.CodeType) -> tuple[SourceLocation, ...]:
    """Return where the value in a guard was used; torch's text ends in that, with the end of the file's path."""
    if stack := locations_in_text(text):
        return stack
    for ending, line, name in re.findall(r"# .*# (\S+\.py):(\d+) in (\S+)", text):
        modules = (getattr(module, "__file__", None) or "" for module in list(sys.modules.values()))
        for file in (code.co_filename, *modules):
            if file.endswith(ending) and is_user_code(file):
                return (SourceLocation.of(file, int(line), function_name(name)),)
    return ()


def current_locations() -> tuple[SourceLocation, ...]:
    """Return the user code on the caller's stack, outermost first, down from the audit's call of the model."""
    frame: types.FrameType | None = sys._getframe(1)
    locations: list[SourceLocation] = []
    while frame is not None:
        if is_user_code(frame.f_code.co_filename):
            name = function_name(frame.f_code.co_name)
            locations.append(SourceLocation.of(frame.f_code.co_filename, frame.f_lineno, name))
        elif frame.f_code.co_filename.startswith(_CALLS_THE_MODEL):
            break  # frames further out called the audit, not the model
        frame = frame.f_back
    return tuple(reversed(locations))


def called_from(callers: tuple[SourceLocation, ...], stack: tuple[SourceLocation, ...]) -> tuple[SourceLocation, ...]:
    """Return a stack that Dynamo traced after the calls in Python that led to it.

    After a break Dynamo compiles the rest of a function, which the function itself calls: it is listed once.
    """
    if callers and stack and (callers[-1].file, callers[-1].function) == (stack[0].file, stack[0].function):
        callers = callers[:-1]
    return callers + stack


class Layers:
    """Finds the modules of a model that run a line."""

    def __init__(self, model: Any) -> None:
        self._of_class: dict[type, list[str]] = {}
        self._known: dict[tuple[SourceLocation, ...], tuple[str, ...]] = {}
        self._paths: dict[int, str] = {}
        self._wrapped: dict[types.CodeType, types.CodeType] = {}  # by the code of a decorator's wrapper
        self.with_parameters: list[str] = []  # the names of modules that have some of their own
        if isinstance(model, nn.Module):
            for name, module in model.named_modules():
                wrapper = getattr(type(module).forward, "__code__", None)
                code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
                if wrapper is not None and code is not None and wrapper is not code:
                    self._wrapped.setdefault(wrapper, code)
                self._of_class.setdefault(type(module), []).append(name or type(module).__name__)
                if next(module.parameters(recurse=False), None) is not None:
                    self.with_parameters.append(name or type(module).__name__)
        self.name(model)

    def name(self, model: Any) -> None:
        """Record the names of a model's modules for `path`; also called with a copy of the model."""
        if isinstance(model, nn.Module):
            self._paths |= {id(module): name for name, module in model.named_modules()}

    def path(self, module: object) -> str:
        """Return the name of a module in the model, "" for the model itself and for other modules."""
        return self._paths.get(id(module), "")

    @property
    def mixers(self) -> list[str]:
        """The classes of modules that mix tokens, in the order in which the model holds them."""
        return [name for name in dict.fromkeys(cls.__name__ for cls in self._of_class) if _MIXER.search(name)]

    def unwrapped(self, code: types.CodeType) -> types.CodeType:
        """Return a function's own code; for the wrapper that a decorator put around a forward, that of the forward."""
        return self._wrapped.get(code, code)

    def of(self, stack: Iterable[SourceLocation]) -> tuple[str, ...]:
        """Return the modules with the innermost location of a stack that is in the code of any module."""
        key = tuple(stack)
        if key not in self._known:
            self._known[key] = self._find(key)
        return self._known[key]

    def _find(self, stack: tuple[SourceLocation, ...]) -> tuple[str, ...]:
        for location in reversed(stack):
            found = [
                name
                for cls, names in self._of_class.items()
                if any(location.file == file and location.line in lines for file, lines in _code_of(cls))
                for name in names
            ]
            if found:
                return tuple(found)
        return ()


@functools.cache
def _code_of(cls: type) -> list[tuple[str, range]]:
    """Return the file and the lines of each method of a class."""
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
