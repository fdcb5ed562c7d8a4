"""Copies the caches of compiled kernels, Triton's and Inductor's, to identical machines."""

import getpass
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mamba_ops.ops._triton import _triton

MANIFEST = "mamba_ops_caches.json"
_RUNTIMES = [name for name, value in vars(torch.version).items() if isinstance(value, str) and name.isalpha()]


class CachesError(ValueError):
    """There are no caches, or they are another machine's."""


def export(folder: Path, device: torch.device) -> int:
    """Copy this machine's caches to a folder, with the machine's facts; return the number of files.

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
    return count


def bring(folder: Path, device: torch.device) -> int:
    """Copy exported caches to this machine's; return the number of new files.

    Raises:
        CachesError: they were made for another GPU, driver or version, or there are none.
    """
    if not (folder / MANIFEST).is_file():
        raise CachesError(f"there is no {MANIFEST} in {folder}, expected a folder that --export made")
    if (made := _manifest(folder)) != (here := facts_of(device)):
        raise CachesError(f"the caches in {folder} are not for this machine: {_difference(made, here)}")
    return sum(_copy(folder / name, path) for name, path in caches().items() if (folder / name).is_dir())


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


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        made: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CachesError(f"{folder / MANIFEST}: {error}") from None
    return made


def _difference(made: dict[str, Any], here: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} is {here.get(name, 'nothing')} here and {made.get(name, 'nothing')} there"
        for name in {**made, **here}
        if made.get(name) != here.get(name)
    )


def _copy(source: Path, target: Path) -> int:
    """Copy files that are not there yet; each appears whole or not at all."""
    count = 0
    for path in sorted(p for p in source.rglob("*") if p.is_file() and "lock" not in p.name):
        place = target / path.relative_to(source)
        if place.exists() or any(part.startswith("tmp.pid_") for part in path.relative_to(source).parts):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f"{place.name}.{uuid.uuid4().hex}.part")
        if path.name.startswith("__grp__"):  # Triton lists files by absolute paths
            listed = json.loads(path.read_text(encoding="utf-8"))
            listed["child_paths"] = {n: str(place.parent / Path(p).name) for n, p in listed["child_paths"].items()}
            part.write_text(json.dumps(listed), encoding="utf-8")
        else:
            shutil.copy2(path, part)
        part.replace(place)
        count += 1
    return count
