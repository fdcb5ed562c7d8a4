"""Calls that are like an earlier one launch their compiled kernels at once.

A launcher looks at each tensor, and Triton's front at each argument: together that takes the host several times as long
as the launches. What they find is the same in every call of the same shapes, strides, dtypes, numbers and alignment
(see `tape`). The second such call writes it down, and later ones follow it. What watches launches (a profiler's hooks,
a rehearsal, anything that stands for Triton's front) sees all of them: then every call goes the long way.
"""

from collections.abc import Callable
from functools import reduce
from itertools import accumulate
from operator import itemgetter, or_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mamba_ops.ops._triton import _triton
from mamba_ops.ops._triton.common import INTERPRETED
from mamba_ops.ops._triton.tape import Address, Tape

if TYPE_CHECKING:
    from mamba_ops.registry.adapters import Recognised

_MOST = 256  # kinds of call that an op remembers
_PAGE = 512  # bytes: torch's allocators align what they give out to as much
_ALIGNED = 15  # bits that no address has which is a multiple of 16; launchers and kernels look at no others

_valid: list[object] = [object()]  # what calls are prepared under

Runs = Callable[[tuple[int, ...], int], bool]


def forget() -> None:
    """Prepare all calls anew, as launches may be chosen otherwise from now on."""
    _valid[0] = object()


def prepared(function: Callable[[Any], None], recognised: "Recognised") -> "Prepared | None":
    """Return what runs a launcher and learns from it, or None where kernels cannot be launched without it."""
    launching = None if INTERPRETED else _triton.launching()
    return None if launching is None else Prepared(function, recognised, launching)


class Prepared:
    """Runs a launcher, or what it did in an earlier call like this one: a shortcut, as the registry calls it.

    Attributes:
        last: of the latest call that was prepared, what recognises and what runs one like it.
        problems: why some kinds of call are not prepared.
    """

    def __init__(self, function: Callable[[Any], None], recognised: "Recognised", launching: _triton.Launching) -> None:
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.last = recognised.NONE
        self.problems: set[str] = set()
        self._function, self._recognised, self._launching = function, recognised, launching
        self._known: dict[Any, Any] = {}  # kind of call to its `last`; to None after one, to False if not repeatable
        self._under: object = None

    def __call__(self, call: Any) -> None:
        """Run a call that is not like the latest one."""
        if self._launching.is_watched():
            return self._function(call)
        if self._under is not _valid[0]:
            self._under, self._known = _valid[0], {}
        tensors = self._recognised.tensors(call)
        kind = (tuple(map(_facts, tensors)), self._recognised.numbers(call), torch.is_inference_mode_enabled())
        known = self._known.get(kind, ())
        if known == ():
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[kind] = None
        elif known is None:
            return self._prepare(call, kind, tensors)
        elif known:
            addresses = tuple(0 if t is None else t.data_ptr() for t in tensors)
            if known[2](addresses, reduce(or_, addresses)):
                self.last = known
                return None
        return self._function(call)

    def _prepare(self, call: Any, kind: Any, tensors: list[Tensor | None]) -> None:
        """Run a call, and remember what to do in the next one like it."""
        valid = _valid[0]  # as launches are chosen now; another thread may change that meanwhile
        with Tape(tensors) as tape:
            self._function(call)
        if tape.problem is None:
            runs = _repeated(tape, tensors, self._launching, valid)
            self.last = self._known[kind] = self._recognised.likeness(call), self._recognised.numbers(call), runs
        else:
            self._known[kind] = False
            self.problems.add(tape.problem)


def _facts(tensor: Tensor | None) -> Any:
    if (t := tensor) is None:
        return None
    return t.size(), t.stride(), t.dtype, t.layout, t.get_device(), t.requires_grad, t.is_inference()


def _repeated(tape: Tape, tensors: list[Tensor | None], launching: _triton.Launching, valid: object) -> Runs:
    """Return what does the same for other addresses, as long as `valid` is what calls are prepared under."""
    inputs, addresses = len(tensors), [0 if t is None else t.data_ptr() for t in tensors]
    low = [address & _ALIGNED for address in addresses]
    is_aligned = not any(low)
    shared = [(i, addresses.index(a)) for i, a in enumerate(addresses) if a and addresses.index(a) < i]
    device = next(t.device for t in tensors if t is not None)
    *starts, total = accumulate((-(-size // _PAGE) * _PAGE for size in tape.allocated), initial=0)
    taken = {_known_by(value): value for launch in tape.launches for value in launch.arguments}
    placed = [value for value in taken.values() if isinstance(value, Address)]
    own, parts = [v for v in placed if v.of >= inputs], [v for v in placed if v.of < inputs and v.offset]
    constants = {key: value for key, value in taken.items() if not isinstance(value, Address)}
    places = {key: n for n, key in enumerate((*(Address(i, 0) for i in range(inputs)), *parts, *own, *constants))}
    offsets = [starts[address.of - inputs] + address.offset for address in own]
    fixed = tuple(constants.values())
    steps = [
        (
            kernel.run,
            grid,
            kernel.function,
            kernel.packed_metadata,
            itemgetter(*(places[_known_by(v)] for v in arguments)),
        )
        for _, kernel, grid, arguments in tape.launches
    ]
    hooks = [getattr(launch.function, "pre_run_hooks", ()) for launch in tape.launches]
    number = device.index
    is_watched, current_device, current_stream = launching.is_watched, launching.device, launching.stream

    def runs(addresses: tuple[int, ...], bits: int) -> bool:
        if _valid[0] is not valid or is_watched() or current_device() != number or any(hooks):
            return False
        if (bits & _ALIGNED) if is_aligned else [address & _ALIGNED for address in addresses] != low:
            return False
        for i, j in shared:
            if addresses[i] != addresses[j]:
                return False
        if parts:
            addresses = (*addresses, *[addresses[i] + offset for i, offset in parts])
        if offsets:
            memory = torch.empty(total, dtype=torch.uint8, device=device)  # alive until all is launched
            start = memory.data_ptr()
            values = (*addresses, *[start + offset for offset in offsets], *fixed)
        else:
            values = (*addresses, *fixed)
        stream = current_stream(number)
        for run, (x, y, z), function, packed, picked in steps:
            run(x, y, z, stream, function, packed, None, None, None, *picked(values))
        return True

    return runs


def _known_by(value: Any) -> Any:
    """What a launch's arguments of one value have in common: 0.0 is equal to -0.0, and True to 1."""
    return value if isinstance(value, Address) else (type(value), repr(value))
