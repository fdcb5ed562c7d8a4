"""Puts our names at the import paths of other libraries, so that code written for these runs as it is."""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import NoReturn

from mamba_ops.compat.paths import LIBRARIES, Library

_lock = threading.RLock()
_held: dict[str, list["Installation"]] = {}  # by library: the installations that hold it
_seen: set[str] = set()  # libraries that have been installed in this process


class Installation:
    """The libraries that `install` put there; `undo`, or the end of a `with` block, takes them away again.

    Attributes:
        libraries: their import names.
    """

    def __init__(self, libraries: tuple[str, ...]) -> None:
        self.libraries = libraries
        self._is_held = True

    def undo(self) -> None:
        """Take away the libraries that no other installation holds. A second call has no effect.

        What was imported from them stays as it is where it is; a later import finds what it found before.
        """
        with _lock:
            if not self._is_held:
                return
            self._is_held = False
            for name in self.libraries:
                _held[name].remove(self)
                if not _held[name]:
                    del _held[name]
                    _forget(name)
            _finder.show(_held)

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Installation({', '.join(self.libraries)}{'' if self._is_held else '; undone'})"


def install(*libraries: str, replace: bool = False) -> Installation:
    """Let the import paths of other libraries lead to this package, until `undo()` of what is returned.

    `import mamba_ssm`, and every module below it that belongs to the families of this package, then gives our functions
    and modules under the original names; `importlib.metadata` and `importlib.util.find_spec` answer as for the
    original, whose version they tell. What is not here is an ImportError that says so. Modules that looked for a
    library before it was installed do not look again: install first.

    Args:
        libraries: import names: "causal_conv1d", "fla", "mamba_ssm".
        replace: whether to take the place of a library that is installed in this environment.

    Raises:
        ValueError: a library is not among these, is imported already, or is installed and `replace` is not given.
            Nothing is changed then.
    """
    expected = f"some of {', '.join(sorted(LIBRARIES))}"
    if not libraries:
        raise ValueError(f"install: libraries: got none, expected {expected}")
    for name in libraries:
        if name not in LIBRARIES:
            raise ValueError(f"install: libraries: got {name!r}, expected {expected}")
    with _lock:
        for name in libraries:
            if name not in _held:
                _refuse_original(name, replace)
        installation = Installation(tuple(dict.fromkeys(libraries)))
        for name in installation.libraries:
            _held.setdefault(name, []).append(installation)
        _finder.show(_held)
        is_first = not _seen.issuperset(libraries)
        _seen.update(libraries)
    if is_first:
        _warn_of_late_files()
    return installation


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules and distributions of what is installed."""

    def __init__(self) -> None:
        self._shown: Mapping[str, Library] = {}  # never changed, but replaced: imports in other threads read it

    def show(self, names: Mapping[str, object]) -> None:
        self._shown = {name: LIBRARIES[name] for name in names}
        if self._shown and self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        elif not self._shown and self in sys.meta_path:
            sys.meta_path.remove(self)
        _forget_availability()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        library = self._shown.get(fullname.partition(".")[0])
        if library is None:
            return None
        if fullname in library.modules:  # all are packages: what is imported from one and not there is looked for here
            origin = f"mamba_ops.compat for {fullname}"
            return importlib.machinery.ModuleSpec(fullname, _loader, origin=origin, is_package=True)
        # Without a name: the import of names takes an error that has one for a module that need not be there.
        raise ModuleNotFoundError(f"{fullname}: {library.why_not()}")

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        wanted = None if context is None or context.name is None else _normal(context.name)
        for library in self._shown.values():
            for name in library.distributions:
                if wanted in (None, _normal(name)):
                    yield _Distribution(library, name)


class _Loader(importlib.abc.Loader):
    """Fills a module with our names, and a library's first with the modules below it."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        root = module.__name__.partition(".")[0]
        library = LIBRARIES[root]
        for source, names in library.modules[module.__name__].items():
            ours = importlib.import_module(f"mamba_ops.compat.{source}")
            for name in names.split():
                theirs, _, own = name.partition("=")
                setattr(module, theirs, getattr(ours, own or theirs))
        vars(module)["__getattr__"] = functools.partial(_no_attribute, module.__name__, library)
        if module.__name__ == root:
            module.__dict__["__version__"] = library.version
            for name in library.modules:
                importlib.import_module(name)


def _no_attribute(module: str, library: Library, name: str) -> NoReturn:
    why = "" if name.startswith("__") else f": {library.why_not()}"
    raise AttributeError(f"module {module!r} has no attribute {name!r}{why}")


class _Distribution(importlib.metadata.Distribution):
    """What the metadata of an original distribution say, as far as programs ask for it."""

    def __init__(self, library: Library, name: str) -> None:
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {library.version}\n"
            "Summary: the names of this library, over mamba_ops\n",
            "top_level.txt": f"{library.name}\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(str(filename))

    def locate_file(self, path: object) -> NoReturn:
        raise FileNotFoundError(f"{path}: there are no files of a library that mamba_ops.compat stands for")


_finder, _loader = _Finder(), _Loader()


def _refuse_original(name: str, replace: bool) -> None:
    """Raise if the library itself is imported, or is installed and must not be replaced."""
    loaded = next((m for m in list(sys.modules) if m == name or m.startswith(f"{name}.")), None)
    if loaded is not None:
        got, expected = f"{loaded} is imported already", "a process that has not imported it: install first"
        raise ValueError(f"install: {name}: {got}, expected {expected}")
    if replace:
        return
    for finder in sys.meta_path:
        if finder is _finder or getattr(finder, "find_spec", None) is None:
            continue
        if (spec := finder.find_spec(name, None)) is not None:
            got, expected = f"it is installed at {spec.origin}", "an environment without it, or replace=True"
            raise ValueError(f"install: {name}: {got}, expected {expected}")


def _forget(name: str) -> None:
    for module in [m for m in list(sys.modules) if m == name or m.startswith(f"{name}.")]:
        del sys.modules[module]


_CHECKS = (  # which Transformers asks once
    "is_causal_conv1d_available",
    "is_flash_linear_attention_available",
    "is_mamba_2_ssm_available",
    "is_mamba_ssm_available",
    "_package_distribution_mapping",
)


def _forget_availability() -> None:
    """Let Transformers ask again which packages there are."""
    checks = sys.modules.get("transformers.utils.import_utils")
    for name in _CHECKS:
        with contextlib.suppress(AttributeError):
            getattr(checks, name).cache_clear()


def _warn_of_late_files() -> None:
    """Say which modeling files of Transformers have looked for these libraries before, and found none."""
    marks = re.compile(r"transformers\.models\.\w+\.modeling_\w+")
    looks = "use_kernel_func_from_hub_with_fallback"
    late = [n for n, m in sorted(sys.modules.items()) if marks.fullmatch(n) and hasattr(m, looks)]
    if late:
        warnings.warn(
            f"install: {', '.join(late)}: imported before, and keeps the functions that it found then; "
            "import it later, or use mamba_ops.compat.transformers.use_mamba_ops(model)",
            stacklevel=3,
        )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
