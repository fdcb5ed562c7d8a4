"""Declare a kernel once: `Namespace` makes torch.library ops out of documented functions."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from mamba_ops.registry import _torch, errors
from mamba_ops.registry.dispatcher import caller, dispatcher
from mamba_ops.registry.op import Op, P


class Declare(Protocol):
    """The decorator that `Namespace.op` returns; the signature of the function survives."""

    @overload
    def __call__(self, function: Callable[P, Tensor], /) -> "Op[P]": ...
    @overload
    def __call__(self, function: Callable[..., None], /) -> "Op[...]": ...


class Namespace:
    """A set of ops under one `torch.ops` namespace.

    Args:
        name: the `torch.ops` namespace. `<NAME>_BACKEND` is its environment variable, and the entry-point group
            `<name>.backends` is where other packages add kernels to its ops.

    Attributes:
        settings: names that the variable may set beside ops, each with what reads the word behind the `=`.
    """

    def __init__(self, name: str) -> None:
        errors.refuse_duplicate("namespace", name, dispatcher.namespaces.get(name))
        self.name, self.source = name, caller()
        self.settings: dict[str, Callable[[str], Any]] = {}
        self._library = torch.library.Library(name, "FRAGMENT")
        self._sentences: list[str] = []  # which compiled calls raise, by number
        self._define("refuse", "(Tensor(a!) output, int code) -> ()", self._refuse, lambda output, code: None)
        dispatcher.namespaces[name] = self

    def op(
        self,
        *,
        mutates: Iterable[str] = ("out",),
        splits_graph: bool = False,
        reads_host: bool = False,
        composed: bool = False,
        reference: Callable[..., Any] | str | None = None,
        arguments: type[tuple[Any, ...]] | None = None,
        replaces: str | None = None,
        returns: Iterable[str] = (),
        out_may_be: str | None = None,
        added: Iterable[str] = (),
        gradients_in: str | None = None,
    ) -> Declare:
        """Declare the decorated function as an op; the function is its contract, its schema and its reference.

        The function has the front's signature and ends in `*, ..., out: Tensor | None = None) -> Tensor`; inside it,
        `require_out(out)` is the tensor to write. (`*, output: Tensor) -> None`, the schema's own form, is taken too;
        then type checkers see no signature.) Its parameters are Tensors, ints, floats and bools; Tensors and floats
        may be optional. A cache that callers may leave out is `*, cache: Tensor | None = None`, named in `mutates`:
        checks, refusals and kernels get None then, and the schema, which may have no optional mutated tensor, an
        empty one.

        Args:
            mutates: names of all parameters that the op writes, `out` among them.
            splits_graph: engines may cut their graphs at this op.
            reads_host: the op reads a tensor on the host and cannot be captured in a CUDA graph.
            composed: the function calls other ops. Its backend is then called `composed`, and a backend asked for by a
                bare name that has no kernel for this op acts on the ops inside.
            reference: where the reference is, `package.module:function`, if it is not the body of the decorated one;
                it is loaded at its first use, and takes what every kernel takes.
            arguments: the NamedTuple of a call's arguments, for kernels and facets that take a call as one value; its
                fields are the op's parameters. None: one is made.
            replaces: a regular expression of the names that other libraries give to functions which this op stands
                for; an audit then advises it.
            returns: names of the parameters that are no arguments of the op: its body allocates them with
                `allocate_output`, hands them to the kernel and returns them. They are keyword-only Tensors and all that
                the op mutates. For ops that are differentiated; `registry/training.py` declares them.
            out_may_be: the input that `out` may be, the very same tensor; every kernel then reads what it needs of it
                before it writes. Apart from that no call has a tensor that the op writes share memory with another.
            added: keywords, with defaults, that the op gained when other packages had kernels for it already. A kernel
                may lack them; it is then given no call in which one has another value than its default.
            gradients_in: what records gradients in the place of an op that does not, or of states; refusals name it.
                None: of an op that does, the function of its name in the namespace's `functional`.
        """

        def declare(function: Callable[..., Any]) -> Any:
            front = type(function.__name__, (Op,), {"__doc__": function.__doc__, "__module__": function.__module__})
            written = frozenset("output" if name == "out" else name for name in mutates)
            flags: dict[str, Any] = {"splits_graph": splits_graph, "reads_host": reads_host, "composed": composed}
            flags |= {
                "returns": tuple(returns),
                "out_may_be": out_may_be,
                "gradients_in": gradients_in,
                "added": tuple(added),
            }
            return front(self, function, written, reference, arguments, **flags, replaces=replaces)

        return declare

    def remove(self) -> None:
        """Take the namespace and its ops out of torch and of the registry again (for tests and reloading)."""
        dispatcher.remove_namespace(self.name)
        _torch.destroy(self._library)

    def _define(self, name: str, schema: str, body: Any, fake: Any, *tags: torch.Tag) -> None:
        self._library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        self._library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{self.name}::{name}", fake, lib=self._library)

    def _differentiate(self, name: str, backward: Any, setup_context: Any) -> None:
        """Give an op a formula for its gradients."""
        qualname = f"{self.name}::{name}"
        torch.library.register_autograd(qualname, backward, setup_context=setup_context, lib=self._library)

    def _refuse(self, output: Tensor, code: int) -> None:
        raise ValueError(self._sentences[code])

    def _number(self, sentences: Iterable[str]) -> int:
        """Store sentences; return the first one's number."""
        first = len(self._sentences)
        self._sentences.extend(sentences)
        return first
