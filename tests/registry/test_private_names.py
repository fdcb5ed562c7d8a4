"""Without a private name of torch's everything still works, if slower: import, eager and compiled calls, swaps."""

from pathlib import Path

import pytest

from mamba_ops.registry import _torch
from tests import fresh

PROGRAM = """
import importlib, pathlib, sys, warnings
name = sys.argv[1]
LIVED_BY = ("_op", "peek_interpreter_stack", "_current_level", "_profiler_enabled", "_is_torch_function_mode_enabled",
            "py_impl", "get_proxy_mode", "_increment_version")
module, _, attribute = name.partition(":")
if attribute == "_dynamo_marked_constant":  # Dynamo has another mark, which its public function sets
    import torch._dynamo.decorators
    import torch._dynamo.variables.functions as functions
    import types
    read = pathlib.Path.read_text
    pathlib.Path.read_text = lambda self, *args, **kwargs: read(self, *args, **kwargs).replace(attribute, "_other_mark")
    source = read(pathlib.Path(functions.__file__)).replace(attribute, "_other_mark")
    exec(compile(source, functions.__file__, "exec"), vars(functions))
    torch._dynamo.decorators.assume_constant_result.__code__ = (
        lambda fn: setattr(fn, "_other_mark", True) or fn
    ).__code__
import torch
import torch._dynamo, torch._functorch.aot_autograd, torch._inductor.compile_fx
import torch._dynamo.backends.cudagraphs  # torch's own uses of the name are bound

*path, last = attribute.split(".")
if last in LIVED_BY:  # torch itself lives by it; it is hidden from this package
    holder = importlib.import_module(module)
    for part in path:
        holder = getattr(holder, part)

    def hidden(self, name, found=type.__getattribute__(type(holder) if not path else holder, "__getattribute__")):
        if name == last and sys._getframe(1).f_code.co_filename.endswith("_torch.py"):
            raise AttributeError(name)
        return found(self, name)

    if path:
        holder.__getattribute__ = hidden
    else:
        holder.__class__ = type("Hiding", (type(holder),), {"__getattribute__": hidden})
elif attribute != "_dynamo_marked_constant":
    holder = importlib.import_module(module)
    for part in path:
        holder = getattr(holder, part)
    if hasattr(holder, last):
        delattr(holder, last)

warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mamba_ops
    from mamba_ops.registry import Backend, Namespace, require_out, use_backend

    x, weight = torch.randn(3, 24), torch.randn(24, 4)
    state = torch.randn(3, 3, 24).transpose(1, 2)
    marker = Backend("marker", devices=None, priority=-1)

    def kernel(call):
        call.output.fill_(7.0)

    marker.implements(mamba_ops.causal_conv1d_update, kernel)
    from torch._dynamo.utils import counters

    def step(x, state):
        return mamba_ops.causal_conv1d_update(x, state, weight)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            expected, got = step(x, state.clone()), compiled(x, state.clone())
            assert torch.equal(expected, got), "eager and compiled differ"
            with use_backend("marker"):
                assert float(step(x, state.clone())[0, 0]) == 7.0
                assert float(compiled(x, state.clone())[0, 0]) == 7.0, "the compiled call was not swapped"
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1 or attribute == "mark_dynamic" and graphs == 2, graphs
    toys = Namespace("toys")
    toys.remove()
own = [str(w.message) for w in caught if "this torch has no" in str(w.message)]
assert len(own) == len(set(own)) <= 1, own
print("ok", *own)
"""


DAILY = ("TensorGuards", "_op", "mark_dynamic", "_dynamo_marked_constant")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n.endswith(DAILY) else pytest.mark.slow) for n in _torch.PRIVATE]
)
def test_without(name: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[2]
    done = fresh.run([program, name], cwd=root, env=_environment(root))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok")


def _environment(root: Path) -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(root), "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def test_the_registry_has_private_names_of_torch_in_one_file() -> None:
    folder = Path(_torch.__file__).parent
    sources = [path for path in folder.glob("*.py") if path.name != "_torch.py"]
    assert len(sources) > 10
    private = ("torch._C", "torch._dynamo", "torch._ops", "torch._guards", "cudagraph_trees", "reductions")
    found = [(p.name, line) for p in sources for line in p.read_text().splitlines() if any(n in line for n in private)]
    assert [f for f in found if "_torch." not in f[1]] == []
