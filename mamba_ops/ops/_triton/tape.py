"""What a launcher does in a call, written down so that calls like it can do it again without the launcher.

A launcher's choices depend on shapes, strides, dtypes, numbers and the alignment of addresses alone. So of a call that
is like an earlier one in all of these everything is known but the addresses: those of its tensors, and those of memory
that the launcher allocates.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_here = threading.local()  # `tape`: what this thread's launches are written to
_PLAIN = (type(None), bool, int, float, str, tl.dtype)
_FACTORIES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class NotRepeatableError(Exception):
    """A launcher does something that is not known to be the same in every call like this one."""


class Launch(NamedTuple):
    """A launch of a compiled kernel.

    Attributes:
        function: the kernel that was compiled.
        kernel: what it was compiled to.
        grid: three numbers.
        arguments: all, in the kernel's order: an `Address`, or what is the same in all calls.
    """

    function: Any
    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


class Address(NamedTuple):
    """An address that each call has anew.

    Attributes:
        of: the number of a tensor of the call, or of allocated memory after these.
        offset: bytes from there.
    """

    of: int
    offset: int


class Tape(TorchDispatchMode):
    """Writes down what a launcher does within the block.

    Attributes:
        launches: those of kernels.
        allocated: memory that the launcher had, in bytes (a property).
        problem: why calls like this one cannot do the same, or None.
        is_launching: whether a launch is under way.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.problem: str | None = None
        self.is_launching = False
        self._addresses: dict[int, Address] = {}  # that of a tensor of the call, the first of several, or of its part
        for number, tensor in enumerate(tensors):
            if tensor is not None and tensor.data_ptr():
                self._addresses.setdefault(tensor.data_ptr(), Address(number, 0))
        self._inputs = len(tensors)
        self._kept: list[Tensor] = []  # so that no address is given out twice

    @property
    def allocated(self) -> list[int]:
        return [tensor.untyped_storage().nbytes() for tensor in self._kept]

    def __enter__(self) -> "Tape":
        _here.tape = self
        super().__enter__()
        torch.empty(0)
        if not self._kept:  # as where a subclass runs with dispatch modes disabled
            self.problem = "torch does not tell what is called here"
        self._kept.clear()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _here.tape = None

    def _see(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """See what the launcher does with torch: it may allocate, and view what it has."""
        result = func(*args, **(kwargs or {}))
        if self.is_launching or not (isinstance(result, Tensor) or any(isinstance(value, Tensor) for value in args)):
            return result  # such as which dtype two dtypes are promoted to
        name = func.overloadpacket.__name__
        results = result if isinstance(result, (list, tuple)) else (result,)
        if name in _FACTORIES and isinstance(result, Tensor):
            self._kept.append(result)
        elif not func.is_view or any(_is_apart(args[0], each) for each in results):
            self.problem = self.problem or f"it calls {name}"
        elif not all(self._follow(args[0], each) for each in results):
            self.problem = self.problem or f"{name} begins where another tensor does"
        return result

    def _follow(self, base: Tensor, view: Tensor) -> bool:
        """Note where a view of a tensor of the call begins. Returns whether that cannot be taken for another tensor."""
        begin, address = base.data_ptr(), view.data_ptr()
        if address == begin or view.numel() == 0 or self._allocation_of(address) is not None:
            return True
        if (of_base := self._addresses.get(begin)) is None:
            return False
        place = Address(of_base.of, of_base.offset + address - begin)
        return self._addresses.setdefault(address, place) == place

    def _allocation_of(self, address: int) -> Address | None:
        for number, tensor in enumerate(self._kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                return Address(self._inputs + number, address - storage.data_ptr())
        return None

    def add(self, function: Any, kernel: Any, grid: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Write down a launch."""
        try:
            if kernel is None or not isinstance(grid, tuple):
                raise NotRepeatableError("no kernel" if kernel is None else "a grid that is computed")
            names = function.arg_names[len(args) :]
            arguments = tuple(self._placed(value) for value in (*args, *(kwargs[name] for name in names)))
            self.launches.append(Launch(function, kernel, (*grid, 1, 1)[:3], arguments))
        except (NotRepeatableError, KeyError) as error:
            self.problem = self.problem or f"{function.__name__}: {error}"

    def _placed(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if not callable(getattr(value, "data_ptr", None)):
            raise NotRepeatableError(f"it takes a {type(value).__name__}")
        if (address := value.data_ptr()) == 0:
            return 0
        if (place := self._addresses.get(address)) is not None:
            return place
        if (found := self._allocation_of(address)) is not None:
            return found
        raise NotRepeatableError("it takes a tensor of its own")


# Not in the class: of what stands there torch makes a function that imports torch._dynamo when it is called, which
# takes seconds. Calls that are compiled never come here.
Tape.__torch_dispatch__ = Tape._see  # type: ignore[assignment, method-assign]


def _is_apart(base: Tensor, result: Tensor) -> bool:
    """Whether what is declared a view of a tensor is a copy: so are `contiguous`, `to` and `reshape`, which come whole
    where nothing records gradients, as in inference mode.
    """
    return base.untyped_storage().data_ptr() != result.untyped_storage().data_ptr()


def observed(function: Any) -> Any:
    """Let a kernel write its launches to the tape of the thread that launches it, if there is one."""

    def run(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if (tape := getattr(_here, "tape", None)) is None or warmup:
            return type(function).run(function, *args, grid=grid, warmup=warmup, **kwargs)
        tape.is_launching = True  # what a launch itself does with torch is not the launcher's
        kernel = type(function).run(function, *args, grid=grid, warmup=warmup, **kwargs)
        tape.is_launching = False
        tape.add(function, kernel, grid, args, kwargs)
        return kernel

    function.run = run
    return function
