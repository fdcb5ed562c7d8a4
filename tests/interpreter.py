"""Triton's interpreter, without the work that it repeats: half of the time that it takes.

Kernels compute what they computed before. What is replaced here is private to Triton, and stays as it is where a
version has no such thing.
"""

import dataclasses
import functools
from typing import Any

from triton import language as tl
from triton.runtime import interpreter


@functools.cache
def hasten() -> None:
    """Replace the functions that take most of the time; once in a process."""
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once_in_a_launch(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _looked_up_once(interpreter._get_np_dtype)
    options = getattr(interpreter.interpreter_builder, "options", None)
    # Sums of integers are computed again in 64 bits, for an assertion that exists where `debug` is set alone.
    if options is not None and not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    if hasattr(tl.core, "block_type") and hasattr(tl.core, "tensor"):
        _make_types_once()


def _make_types_once() -> None:
    """Each result of an operation makes its type anew, from a list of sizes, and from that a tuple of constants."""
    make_type, make_tensor = tl.core.block_type.__init__, tl.core.tensor.__init__
    known: dict[Any, dict[str, Any]] = {}

    def type_init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(shape)
        if isinstance(element_ty, tl.pointer_type) or not all(type(size) is int for size in sizes):  # have no hash
            make_type(self, element_ty, shape)
            return
        key = element_ty, sizes
        if key not in known:
            make_type(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    @functools.cache
    def constants(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        made = object.__new__(tl.core.tensor)
        make_tensor(made, None, tl.core.block_type(tl.float32, list(sizes)))
        return made.shape, made.numel

    scalar = object.__new__(tl.core.tensor)
    make_tensor(scalar, None, tl.float32)

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = constants(tuple(type.shape)) if type.is_block() else (scalar.shape, scalar.numel)

    tl.core.block_type.__init__, tl.core.tensor.__init__ = type_init, tensor_init


def _once_in_a_launch(patch: Any) -> Any:
    """Each call of a device function looks through all of Triton's language for what a launch has replaced already."""
    replaced: list[set[int]] = []

    def patch_once(function: Any) -> Any:
        languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if any(languages <= known for known in replaced):
            return interpreter._LangPatchScope()  # with nothing to put back
        scope, is_launch = patch(function), not replaced
        replaced.append(languages)
        if is_launch:
            restore = scope.restore

            def restore_all() -> None:
                replaced.clear()
                restore()

            scope.restore = restore_all
        return scope

    return patch_once


def _looked_up_once(np_dtype_of: Any) -> Any:
    """Each question makes a table of all types."""
    known = functools.cache(np_dtype_of)

    def look_up(kind: Any) -> Any:
        scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return np_dtype_of(scalar) if isinstance(scalar, tl.pointer_type) else known(scalar)  # pointers have no hash

    return look_up
