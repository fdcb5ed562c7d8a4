"""A stand-in for the graphs of a device, so that the runner's recording and replaying can be seen on a CPU.

It proves nothing about CUDA or XPU graphs. What it has in common with them: nothing runs while a call is recorded; a
replay does again what was launched, with the kernels and the host's numbers of then, on the memory of then; results lie
where they lay. Recording something that was never run before, and replaying what read the host, are not checked.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

T = TypeVar("T")


class Tape:
    """Records with `TorchDispatchMode`: the aten calls that a function comes down to.

    Attributes:
        records, replays: how many there were.
        fail: raised by the next recording, once.
    """

    def __init__(self) -> None:
        self.records = self.replays = 0
        self.fail: Exception | None = None

    def record(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        if (fail := self.fail) is not None:
            self.fail = None
            raise fail
        mode = Recording()
        with mode:
            result = call()
        for tensor, content in mode.before.values():
            tensor.copy_(content)
        for tensor in mode.made:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        self.records += 1

        def replay() -> None:
            self.replays += 1
            mode.play()

        return result, replay


class Recording(TorchDispatchMode):
    """What is called within the block, to be done again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: list[Tensor] = []  # memory that is new, not views of it
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # by storage: what was there, of memory that is not

    def play(self) -> None:
        for function, args, kwargs, outputs in self.calls:
            results = _tensors(function(*args, **kwargs))
            for mine, new in zip(outputs, results, strict=bool(outputs)):  # what writes in place has none
                mine.copy_(new)

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # or compiled code would refuse to run under it

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace != "aten":  # an op of ours, or a user's: what it calls is recorded
            with self:
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:  # inside such an op, what autograd would have taken apart comes whole
                return function.decompose(*args, **kwargs)
        schema = function._schema
        if schema.is_mutable:
            mine = {tensor.untyped_storage().data_ptr() for tensor in self.made}
            for tensor in _tensors((args, kwargs)):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in mine and storage.nbytes():
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.before.setdefault(storage.data_ptr(), (whole, whole.clone()))
        result = function(*args, **kwargs)
        if schema.is_mutable:
            self.calls.append((function, args, kwargs, []))
        elif all(r.alias_info is None for r in schema.returns):  # a view stays a view
            made = _tensors(result)
            self.made += made
            self.calls.append((function, args, kwargs, made))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
