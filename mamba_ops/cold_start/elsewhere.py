"""Compiling kernels in a process that has no GPU, for a device of another process."""

from typing import Any

from mamba_ops.ops._triton import _triton


def describe_target() -> dict[str, Any]:
    """Return what another process compiles for, in plain values: `compile_for` takes them there."""
    driver = _triton.named(*_triton.DRIVER.split(":"))
    launcher, utils = (getattr(driver, name, None) for name in ("launcher_cls", "utils"))
    if launcher is None or launcher.__module__ not in _triton.LAUNCHERS:
        launcher = utils = None
    return {
        "target": vars(driver.get_current_target()),
        "launcher": launcher and (launcher.__module__, launcher.__qualname__),
        "utils": utils and (type(utils).__module__, type(utils).__qualname__),
    }


class _Target:
    """Stands for Triton's driver: knows the target, and makes launchers, but has no device."""

    def __init__(self, target: dict[str, Any], launcher: tuple[str, str] | None, utils: tuple[str, str] | None) -> None:
        self.target = _triton.named(*_triton.TARGET.split(":"))(**target)
        self.launcher_cls = _triton.named(*launcher) if launcher else None
        self.utils = _triton.named(*utils)() if utils else None

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def compile_for(target: dict[str, Any]) -> None:
    """Let this process, which needs no GPU, compile for what `describe_target` said."""
    from triton.runtime import driver

    driver.set_active(_Target(**target))


def compile_variant(function: Any, specialization_data: str) -> None:
    """Compile a variant of a kernel to Triton's cache on disk, and its launcher where Triton writes one in C."""
    kernel = function.preload(specialization_data)
    if (launcher := _triton.named(*_triton.DRIVER.split(":")).launcher_cls) is not None:
        launcher(kernel.src, kernel.metadata)
