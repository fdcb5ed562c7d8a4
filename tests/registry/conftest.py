"""A namespace of toys, taken away again after each test."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from mamba_ops import registry
from mamba_ops.registry import Backend, Namespace, Op, bad_argument, require_out


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    registry.selection._warned.clear()


@pytest.fixture
def toys() -> Iterator[Namespace]:
    namespace = Namespace("toys")
    yield namespace
    namespace.remove()


@pytest.fixture
def backend() -> Iterator[Any]:
    made = []

    def make(name: str, **options: Any) -> Backend:
        made.append(Backend(name, **{"devices": None, **options}))
        return made[-1]

    yield make
    for b in made:
        b.remove()


@pytest.fixture
def add(toys: Namespace) -> Op[...]:
    @toys.op(mutates=("total", "out"))
    def add(
        total: Tensor, x: Tensor, *, bias: Tensor | None = None, scale: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """Add x to total; write the scaled total."""
        output = require_out(out)
        total += x
        output.copy_(total * scale + (0 if bias is None else bias))
        return output

    @add.validate
    def _checks(total: Tensor, x: Tensor, output: Tensor) -> None:
        for name, tensor in {"x": x, "out": output}.items():
            if tensor.shape != total.shape:
                raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=str(tuple(total.shape)))
        if x.dtype.is_complex:
            raise bad_argument("x", got=x.dtype, expected="a real dtype")

    @add.allocate_output
    def _output(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    return add
