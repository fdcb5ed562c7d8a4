"""A backend of torch.compile for engines: the graph in pieces, each compiled once and recorded for several sizes."""

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

    Splitting ops run eagerly. The other pieces run as compiled, or, while there is a `recording`, through it.

    Args:
        compile_piece: a backend of torch.compile, for the pieces.

    Attributes:
        graphs: of every graph compiled so far, its pieces.
        recording: records and replays the pieces for the size that runs; None: they just run.
    """

    def __init__(self, compile_piece: str | CompilePiece = "inductor") -> None:
        self._compile = torch._dynamo.lookup_backend(compile_piece) if isinstance(compile_piece, str) else compile_piece
        self.graphs: list[list[Subgraph]] = []
        self.recording: Recording | None = None

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Compile a graph of Dynamo's; of its inputs only what Dynamo noted of them is used."""
        module, pieces = split_graph(gm)
        self.graphs.append(pieces)
        compiled: dict[str, Callable[..., Any]] = {p.name: p.module.forward for p in pieces if p.ops}
        noted = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]  # fakes, symbolic sizes
        mode = next(value.fake_mode for value in noted if isinstance(value, FakeTensor))
        with torch.no_grad(), mode, tracing(TracingContext(mode)):
            _CompilePieces(module, self._compile_piece, compiled).run(*noted)
        for name, function in compiled.items():
            delattr(module, name)
            setattr(module, name, function)
        return module.forward

    def _compile_piece(self, module: GraphModule, inputs: list[Any], foreign: list[bool]) -> "CompiledPiece":
        capturable = not any(_reads_host(node.target) for node in module.graph.nodes)
        [output] = module.graph.find_nodes(op="output")
        single = not isinstance(output.args[0], tuple | list)
        if single:  # compilers want a tuple
            output.args = ((output.args[0],),)
            module.recompile()
        fakes = [value for value in inputs if isinstance(value, FakeTensor)]
        with tracing(TracingContext(fakes[0].fake_mode)) if fakes else nullcontext():  # a compilation of its own
            function = self._compile(module, inputs)
        return CompiledPiece(self, (lambda *args: function(*args)[0]) if single else function, capturable, foreign)


class CompiledPiece:
    """A piece without splitting ops.

    Attributes:
        function: the compiled code.
        capturable: whether its launches are all of it; an op that reads the host would be frozen.
        foreign: of each argument whether it is the caller's: the model's, the plan's or an input; else it comes from
            an earlier piece.
    """

    def __init__(
        self, backend: PiecewiseBackend, function: Callable[..., Any], capturable: bool, foreign: list[bool]
    ) -> None:
        self._backend = backend
        self.function = function
        self.capturable, self.foreign = capturable, foreign

    def __call__(self, *args: Any) -> Any:
        """Run, record or replay it."""
        recording = self._backend.recording
        if recording is None or not self.capturable:
            return self.function(*args)
        return recording.run(self, args)


class _CompilePieces(Interpreter):
    """Runs a split graph on fake tensors; what a piece is called with is what it is compiled for."""

    def __init__(self, module: GraphModule, compile_piece: Callable[..., Any], compiled: dict[str, Any]) -> None:
        super().__init__(module)
        self._pieces = module
        self._compile_piece = compile_piece
        self._compiled = compiled

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_module" and (name := str(n.target)) not in self._compiled:
            args, _ = self.fetch_args_kwargs_from_env(n)
            foreign = [node.op == "placeholder" for node in n.args if isinstance(node, Node)]
            self._compiled[name] = self._compile_piece(self._pieces.get_submodule(name), list(args), foreign)
        return result


def _reads_host(target: Any) -> bool:
    return torch.Tag.cudagraph_unsafe in getattr(target, "tags", ())


class Recording:
    """The pieces, recorded for one size. A step records them, in order; later steps replay them."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._recorded: dict[Any, _Recorded] = {}
        self.complete = False

    def __len__(self) -> int:
        return len(self._recorded)

    def run(self, piece: CompiledPiece, args: tuple[Any, ...]) -> Any:
        """Replay a piece on these arguments; in the first step, record it before."""
        key = (piece, *(a for a in args if not isinstance(a, Tensor)))
        recorded = self._recorded.get(key)
        if recorded is None:
            if self.complete:  # what is recorded later may use memory that an earlier piece of the step still needs
                return piece.function(*args)
            self._recorded[key] = recorded = _Recorded(self._graphs, piece, args)
        if not recorded.load(args):
            return piece.function(*args)
        recorded.replay()
        return recorded.result


class _Recorded:
    """One recorded call. It reads its inputs where they were when it was recorded."""

    def __init__(self, graphs: Graphs, piece: CompiledPiece, args: tuple[Any, ...]) -> None:
        self._inputs = [
            (i, a, a.data_ptr(), foreign)
            for i, (a, foreign) in enumerate(zip(args, piece.foreign, strict=True))
            if isinstance(a, Tensor)
        ]
        self.result, self.replay = graphs.record(lambda: piece.function(*args))

    def load(self, args: tuple[Any, ...]) -> bool:
        """Copy those inputs that are elsewhere now; False where that would overwrite what is the caller's.

        What a piece changes in place must stay where it is.
        """
        moved = [(mine, args[i], foreign) for i, mine, at, foreign in self._inputs if args[i].data_ptr() != at]
        if any(foreign for _, _, foreign in moved):
            return False
        for mine, given, _ in moved:
            mine.copy_(given)
        return True
