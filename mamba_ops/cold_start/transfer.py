"""Copies the caches of compiled kernels, Triton's and Inductor's, to identical machines."""

import getpass
import json
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import uuid
from importlib.util import find_spec
from pathlib import Path

import torch

from mamba_ops.ops._triton import _triton

MANIFEST = "mamba_ops_caches.json"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_RUNTIMES = [name for name, value in vars(torch.version).items() if isinstance(value, str) and name.isalpha()]


class CachesError(ValueError):
    """There are no caches, they are another machine's, or others may have written them."""


def export(folder: Path, device: torch.device) -> int:
    """Copy this machine's caches to a folder, with the machine's facts; return the number of files.

    Nobody but their owner may write what is there then.

    Raises:
        CachesError: there are no caches, or the folder has another machine's.
    """
    found = {name: path for name, path in caches().items() if any(p.is_file() for p in path.rglob("*"))}
    if not found:
        expected = " or ".join(str(path) for path in caches().values())
        raise CachesError(f"there are no caches in {expected}; warm up first")
    facts = facts_of(device)
    if (folder / MANIFEST).is_file() and (before := _manifest(folder)) != facts:
        raise CachesError(f"{folder} has the caches of something else: {_difference(before, facts)}; name another one")
    count = sum(_copy(path, folder / name) for name, path in found.items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink() and (mode := path.stat().st_mode) & _OTHERS_WRITE:
            path.chmod(mode & ~_OTHERS_WRITE)
    return count


def bring(folder: Path, device: torch.device) -> int:
    """Copy exported caches to this machine's; return the number of new files.

    They are code: Inductor's are pickles, Triton's machine code. Processes that load them run it.

    Raises:
        CachesError: they were made for another GPU, driver or version, or there are none; or another user owns or may
            write some of them, or they lie behind a symbolic link.
    """
    _check_trust(folder)
    if not (folder / MANIFEST).is_file():
        raise CachesError(f"there is no {MANIFEST} in {folder}, expected a folder that --export made")
    if (made := _manifest(folder)) != (here := facts_of(device)):
        raise CachesError(f"the caches in {folder} are not for this machine: {_difference(made, here)}")
    return sum(_copy(folder / name, path) for name, path in caches().items() if (folder / name).is_dir())


def _check_trust(folder: Path) -> None:
    """Raise if somebody else could have written what is in a folder, or can still exchange it."""
    for path in (folder, *sorted(folder.rglob("*"))):
        if path.is_symlink():
            raise CachesError(f"{path} is a symbolic link, expected caches as files: name, or copy, what it leads to")
        if os.name != "posix" or not path.exists():
            continue
        facts = path.stat()
        if facts.st_uid not in (os.getuid(), 0):
            raise CachesError(f"{path} belongs to user {facts.st_uid}, expected you or root: caches are code")
        if facts.st_mode & _OTHERS_WRITE:
            got = f"may be written by others ({stat.filemode(facts.st_mode)})"
            hint = f"if you trust what is there, run chmod -R go-w {folder}"
            raise CachesError(f"{path} {got}, expected by its owner alone: caches are code; {hint}")


def facts_of(device: torch.device) -> dict[str, str]:
    """Return all that compiled kernels depend on, by name."""
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{sys.platform} {platform.machine()}",
        "device": device.type,
    }
    try:
        import triton
    except ModuleNotFoundError:
        pass
    else:
        facts["triton"] = triton.__version__
    if device.type == "cpu":
        return facts
    properties = torch.get_device_module(device).get_device_properties(device)
    facts["gpu"] = properties.name
    for name in ("major", "minor", "gcnArchName", "driver_version", "multi_processor_count"):
        if hasattr(properties, name):
            facts[name] = str(getattr(properties, name))
    facts |= {name: str(vars(torch.version)[name]) for name in _RUNTIMES if vars(torch.version).get(name)}
    if (driver := _driver()) is not None:
        facts["driver"] = driver
    return facts


def _driver() -> str | None:
    """Return the version of the GPU's driver, from its kernel module."""
    paths = (Path(f"/sys/module/{module}/version") for module in ("nvidia", "amdgpu", "xe"))
    return next((path.read_text(encoding="utf-8").strip() for path in paths if path.is_file()), None)


def caches() -> dict[str, Path]:
    """Return the folders of Triton's and Inductor's caches."""
    folders = {"inductor": _inductor_cache()}
    return {"triton": _triton.cache_dir(), **folders} if find_spec("triton") else folders


def _inductor_cache() -> Path:
    """Return the folder of Inductor's cache; where this torch has no function for that, the usual one."""
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir
    except ImportError:
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
        usual = Path(tempfile.gettempdir(), f"torchinductor_{user}")
        return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or usual)
    return Path(cache_dir())


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CachesError(f"{path}: {error}; expected what --export wrote") from None
    if not isinstance(made, dict) or not all(isinstance(value, str) for value in made.values()):
        raise CachesError(f"{path}: got no table of a machine's facts, expected what --export wrote")
    return made


def _difference(made: dict[str, str], here: dict[str, str]) -> str:
    return ", ".join(
        f"{name} is {here.get(name, 'nothing')} here and {made.get(name, 'nothing')} there"
        for name in {**made, **here}
        if made.get(name) != here.get(name)
    )


def _copy(source: Path, target: Path) -> int:
    """Copy files that are not there yet, but for locks and unfinished ones; each appears whole or not at all."""
    count = 0
    for path in sorted(p for p in source.rglob("*") if p.is_file() and not _is_lock(p)):
        place = target / path.relative_to(source)
        if place.exists() or any(part.startswith("tmp.pid_") for part in path.relative_to(source).parts):
            continue
        text = _group_in(path, place.parent) if path.name.startswith("__grp__") else None
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f"{place.name}.{uuid.uuid4().hex}.part")
        if text is None:
            shutil.copy2(path, part)
        else:
            part.write_text(text, encoding="utf-8")
        part.replace(place)
        count += 1
    return count


def _is_lock(path: Path) -> bool:
    """Return whether Triton or Inductor made a file to lock others out; a kernel's name may have "lock" in it."""
    return path.name == "lock" or path.suffix == ".lock"


def _group_in(path: Path, folder: Path) -> str:
    """Return Triton's list of a kernel's files, which has absolute paths, as it is in another folder."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        listed["child_paths"] = {name: str(folder / Path(child).name) for name, child in listed["child_paths"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CachesError(f"{path}: got no list of files ({error!r}), expected one that Triton wrote") from None
    return json.dumps(listed)
