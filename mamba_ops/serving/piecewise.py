"""A backend of torch.compile for engines: it splits the graph, compiles each piece once and records it by size."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node

from mamba_ops.registry import Subgraph, split_graph
from mamba_ops.serving.capture import Graphs

CompilePiece = Callable[[GraphModule, list[Any]], Callable[..., Any]]


class PiecewiseBackend:
    """Cut Dynamo's graph at the splitting ops and compile each piece between them: `torch.compile(..., backend=this)`.

    Splitting ops run eagerly. The other pieces run as compiled, or are recorded and replayed by a `recording`.

    Args:
        compile_piece: a backend of torch.compile, for the pieces.

    Attributes:
        graphs: the pieces of every graph that was compiled so far.
        recording: records and replays the pieces for the size that runs; None: they run as compiled.
    """

    def __init__(self, compile_piece: str | CompilePiece = "inductor") -> None:
        if not isinstance(compile_piece, str) and not callable(compile_piece):
            got, expected = f"got a {type(compile_piece).__name__}", "a backend of torch.compile, or its name"
            raise ValueError(f"PiecewiseBackend: compile_piece: {got}, expected {expected}")
        self._compile = torch._dynamo.lookup_backend(compile_piece) if isinstance(compile_piece, str) else compile_piece
        self.graphs: list[list[Subgraph]] = []
        self.recording: Recording | None = None

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Compile a graph of Dynamo's for the fake inputs in its placeholders; the real `inputs` are not used."""
        module, subgraphs = split_graph(gm)
        self.graphs.append(subgraphs)
        compiled: dict[str, Callable[..., Any]] = {s.name: s.module.forward for s in subgraphs if s.ops}
        fakes = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]  # and symbolic sizes
        mode = next(value.fake_mode for value in fakes if isinstance(value, FakeTensor))
        with torch.no_grad(), mode, tracing(TracingContext(mode)):
            _CompilePieces(module, self._compile_piece, compiled).run(*fakes)
        for name, function in compiled.items():
            delattr(module, name)
            setattr(module, name, function)
        return module.forward

    def _compile_piece(self, module: GraphModule, inputs: list[Any], is_callers: list[bool]) -> "CompiledPiece":
        capturable = not any(_reads_host(node.target) for node in module.graph.nodes)
        [output] = module.graph.find_nodes(op="output")
        single = not isinstance(output.args[0], tuple | list)
        if single:  # compilers expect a tuple
            output.args = ((output.args[0],),)
            module.recompile()
        fakes = [value for value in inputs if isinstance(value, FakeTensor)]
        with tracing(TracingContext(fakes[0].fake_mode)) if fakes else nullcontext():  # a separate compilation
            function = self._compile(module, inputs)
        return CompiledPiece(self, (lambda *args: function(*args)[0]) if single else function, capturable, is_callers)


class CompiledPiece:
    """A piece without splitting ops.

    Attributes:
        function: the compiled code.
        capturable: whether it can be recorded; what an op read from the host would stay as it was recorded.
        is_callers: for each argument, whether the caller passes it (a parameter, a plan's tensor or an input), rather
            than an earlier piece.
    """

    def __init__(
        self, backend: PiecewiseBackend, function: Callable[..., Any], capturable: bool, is_callers: list[bool]
    ) -> None:
        self._backend = backend
        self.function = function
        self.capturable, self.is_callers = capturable, is_callers

    def __call__(self, *args: Any) -> Any:
        """Run, record or replay it."""
        recording = self._backend.recording
        if recording is None or not self.capturable:
            return self.function(*args)
        return recording.run(self, args)


class _CompilePieces(Interpreter):
    """Runs a split graph on fake tensors and compiles each piece for the arguments that it gets."""

    def __init__(self, module: GraphModule, compile_piece: Callable[..., Any], compiled: dict[str, Any]) -> None:
        super().__init__(module)
        self._pieces = module
        self._compile_piece = compile_piece
        self._compiled = compiled

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_module" and (name := str(n.target)) not in self._compiled:
            args, _ = self.fetch_args_kwargs_from_env(n)
            is_callers = [node.op == "placeholder" for node in n.args if isinstance(node, Node)]
            self._compiled[name] = self._compile_piece(self._pieces.get_submodule(name), list(args), is_callers)
        return result


def _reads_host(target: Any) -> bool:
    return torch.Tag.cudagraph_unsafe in getattr(target, "tags", ())


class Recording:
    """Recordings of the pieces for one size. The first step records them in order; later steps replay them."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._recorded: dict[Any, _Recorded] = {}
        self.complete = False

    def __len__(self) -> int:
        return len(self._recorded)

    def run(self, piece: CompiledPiece, args: tuple[Any, ...]) -> Any:
        """Replay a piece on these arguments; in the first step, record it first."""
        key = (piece, *(a for a in args if not isinstance(a, Tensor)))
        recorded = self._recorded.get(key)
        if recorded is None:
            if self.complete:  # a later recording might use memory that an earlier piece of the step still needs
                return piece.function(*args)
            self._recorded[key] = recorded = _Recorded(self._graphs, piece, args)
        if not recorded.load(args):
            return piece.function(*args)
        recorded.replay()
        return recorded.result


class _Recorded:
    """One recorded call. It reads its inputs at the addresses that they had when it was recorded."""

    def __init__(self, graphs: Graphs, piece: CompiledPiece, args: tuple[Any, ...]) -> None:
        self._inputs = [
            (i, a, a.data_ptr(), is_callers)
            for i, (a, is_callers) in enumerate(zip(args, piece.is_callers, strict=True))
            if isinstance(a, Tensor)
        ]
        self.result, self.replay = graphs.record(lambda: piece.function(*args))

    def load(self, args: tuple[Any, ...]) -> bool:
        """Copy inputs that have another address now; False where that would overwrite a tensor of the caller.

        A tensor that a piece changes in place must keep its address.
        """
        moved = [(kept, args[i], is_callers) for i, kept, at, is_callers in self._inputs if args[i].data_ptr() != at]
        if any(is_callers for _, _, is_callers in moved):
            return False
        for kept, given, _ in moved:
            kept.copy_(given)
        return True
