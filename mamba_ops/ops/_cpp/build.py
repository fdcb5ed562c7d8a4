"""Builds the C++ kernels: each once for a machine and its compiler, in some seconds, kept on disk."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path

from mamba_ops.registry.jit import announce

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
_THREADS = "-fopenmp"

Run = Callable[[list[int]], None]
"""A kernel, called with the numbers of a call."""


class BuildError(RuntimeError):
    """Why there is no kernel, as a sentence."""


def compiler() -> str | None:
    """The C++ compiler, or None."""
    named = os.environ.get("CXX")
    return next(
        (path for name in ((named,) if named else ("c++", "g++", "clang++")) if (path := shutil.which(name))), None
    )


def why_no_compiler() -> str | None:
    """Return why nothing can be built here, or None."""
    if sys.platform == "win32":
        return "builds its kernels with g++ or clang++, and this is Windows"
    if compiler() is None:
        named = os.environ.get("CXX")
        what = f"CXX names {named}, which is not there" if named else "there is no c++, g++ or clang++"
        return f"builds its kernels with a C++ compiler, and {what}; install one, or set CXX"
    return None


@functools.cache
def run_of(op: str) -> Run:
    """Return an op's kernel; build it if nobody did yet.

    Raises:
        BuildError: there is no compiler, or it says no.
        CompilationError: nothing may be compiled now.
    """
    return built(op, (_HERE.parent / op / "kernel.cpp").read_text())


def why_not(op: str) -> str | None:
    """Return why an op's kernel is not there, or None; build it if nobody did yet."""
    try:
        run_of(op)
    except BuildError as error:
        return str(error)
    return None


def built(op: str, source: str) -> Run:
    """Return the kernel of a source, which may include common.h; see `run_of`."""
    if (reason := why_no_compiler()) is not None:
        raise BuildError(reason)
    path = _folder() / f"{op}-{_key(source)}.so"
    is_built = os.path.exists(path)  # noqa: PTH110  where a folder may not be looked into, Path.exists raises
    announce(f"{op} (C++)", "it is not loaded yet" if is_built else "it is not built yet")
    if not is_built:
        try:
            _compile(op, source, path)
        except OSError as error:
            what = f"keeps its kernels in {path.parent}, which cannot be written to ({error})"
            raise BuildError(f"{what}; set XDG_CACHE_HOME") from error
    try:
        function = ctypes.CDLL(str(path)).run
    except OSError as error:
        raise BuildError(f"cannot load what it built, {path}: {error}") from error
    function.argtypes, function.restype = (ctypes.c_void_p,), None

    def run(numbers: list[int]) -> None:
        given = array("q", numbers)
        function(given.buffer_info()[0])

    return run


def _compile(op: str, source: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        target = Path(folder, path.name)
        command = [str(compiler()), *_FLAGS, f"-I{_HERE}", "-o", str(target), "-x", "c++", "-"]
        for more in ((_THREADS,), ()):  # Apple's clang has no OpenMP
            done = subprocess.run([*command, *more], input=source.encode(), capture_output=True, check=False)
            if done.returncode == 0:
                target.replace(path)  # in one step: other processes may be looking for it
                return
    said = (done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}").splitlines()
    raise BuildError(f"{command[0]} does not build the kernel of {op}: {said[0]}")


def _folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mamba_ops"
    except RuntimeError as error:
        raise BuildError(
            "keeps its kernels in XDG_CACHE_HOME, which is not set, and there is no home folder"
        ) from error


def _key(source: str) -> str:
    """What a build depends on: a cache may be shared by machines whose processors differ."""
    parts = [
        source,
        (_HERE / "common.h").read_text(),
        " ".join(_FLAGS),
        str(compiler()),
        _version(),
        platform.machine(),
    ]
    info = Path("/proc/cpuinfo")
    if info.is_file():
        parts += [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _version() -> str:
    done = subprocess.run([str(compiler()), "--version"], capture_output=True, check=False)
    return done.stdout.decode(errors="replace").partition("\n")[0]
