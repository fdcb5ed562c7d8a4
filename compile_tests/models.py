"""Which models of Transformers do what under `use_mamba_ops`, as Markdown: `python -m compile_tests --models`.

Each check is made on a small model with random weights: on a CPU it computes what stock computes there, and on a GPU
that is not there it is traced, whole.
"""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mamba_ops.audit import absent
from mamba_ops.compat.transformers import cache_of, use_mamba_ops
from tests.transformers_models import ALL_MODELS, VOCABULARY, WITH_EXPERTS, new_model

LENGTHS = (5, 3, 8)
_NEAR = {"rtol": 1e-4, "atol": 1e-4}


class _Subject:
    """A model, and what it is called with."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        experts = {"experts_implementation": "grouped_mm"} if name in WITH_EXPERTS else {}  # as by default
        self.name, self.model = name, new_model(name, "cpu", **experts)
        self.tokens = torch.randint(3, VOCABULARY, (2, sum(LENGTHS)))

    def stock_and_ours(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        stock = call()
        with use_mamba_ops(self.model):
            return stock, call()


def _prefill(it: _Subject) -> None:
    stock, ours = it.stock_and_ours(lambda: it.model(it.tokens, use_cache=False).logits)
    torch.testing.assert_close(ours, stock, **_NEAR)


def _padding(it: _Subject) -> None:
    mask = torch.ones_like(it.tokens)
    mask[0, :4] = 0
    stock, ours = it.stock_and_ours(lambda: it.model(it.tokens, attention_mask=mask, use_cache=False).logits)
    torch.testing.assert_close(ours[0, 4:], stock[0, 4:], **_NEAR)
    torch.testing.assert_close(ours[1], stock[1], **_NEAR)


def packing() -> dict[str, Tensor]:
    """Return what says that a row holds documents."""
    places = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    ends = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    return {"position_ids": places, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}


def _packed(it: _Subject) -> None:
    row = it.tokens[:1]
    want = torch.cat([it.model(part, use_cache=False).logits for part in row.split(LENGTHS, dim=1)], 1)
    with use_mamba_ops(it.model):
        torch.testing.assert_close(it.model(row, use_cache=False, **packing()).logits, want, **_NEAR)


def _generate(it: _Subject, **options: Any) -> None:
    options = {"max_new_tokens": 24, "do_sample": False} | options
    stock, ours = it.stock_and_ours(lambda: it.model.generate(it.tokens, **options))
    assert torch.equal(stock, ours), "other tokens"


def _parts(it: _Subject) -> None:
    want = it.model(it.tokens, use_cache=False).logits
    cache: dict[str, Any] = {}
    with use_mamba_ops(it.model):
        found = []
        for part in it.tokens.split(LENGTHS, dim=1):
            out = it.model(part, **cache, use_cache=True)
            cache = cache_of(out)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), want, **_NEAR)


def _beams(it: _Subject) -> None:
    _generate(it, num_beams=3, max_new_tokens=8)


def _compiled(it: _Subject) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    torch.compiler.reset()
    with use_mamba_ops(it.model):
        compiled = torch.compile(it.model, fullgraph=True, dynamic=True, backend=count)
        for length in (11, 13, 16):
            want = it.model(it.tokens[:, :length], use_cache=False).logits
            torch.testing.assert_close(compiled(it.tokens[:, :length], use_cache=False).logits, want, **_NEAR)
    assert graphs == 1, f"{graphs} graphs"


def _exported(it: _Subject) -> None:
    with use_mamba_ops(it.model):
        program = torch.export.export(it.model, (it.tokens,), {"use_cache": False}, strict=False)
        want = it.model(it.tokens, use_cache=False).logits
    found = program.module()(it.tokens, use_cache=False).logits
    torch.testing.assert_close(found, want, **_NEAR)
    assert any("mamba_ops" in str(node.target) for node in program.graph.nodes), "none of our ops"


def _train(it: _Subject) -> None:
    it.model.train()
    parameters = list(it.model.parameters())

    def gradients() -> list[Tensor]:
        loss = it.model(it.tokens, labels=it.tokens, use_cache=False).loss
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    with torch.enable_grad():
        stock, ours = it.stock_and_ours(gradients)
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)


CHECKS: dict[str, Callable[[_Subject], None]] = {
    "prefill": _prefill,
    "left padding": _padding,
    "packed": _packed,
    "generate": _generate,
    "prompt in parts": _parts,
    "beams": _beams,
    "one graph": _compiled,
    "export": _exported,
    "train": _train,
}
TRACES = ("prefill", "packed", "one step", "prompt in parts")


def check(name: str) -> dict[str, str]:
    """Return what each check on a CPU says: "yes", or why not."""
    return {title: _said(lambda function=function: function(_Subject(name))) for title, function in CHECKS.items()}


def _said(call: Callable[[], None]) -> str:
    try:
        with torch.no_grad():
            call()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}".replace("|", "/")[:160]
    return "yes"


def traced(name: str, *, device: str) -> dict[str, str]:
    """In a child process: trace a model for a device that is not there, each call whole."""
    it = _Subject(name)

    def trace(tokens: Tensor, **options: Any) -> None:
        tracer = absent.Tracer(it.model, device=device, dynamic=True)
        tracer(tokens, **options)
        found = tracer.trace
        assert found.stopped is None, found.stopped
        assert not found.breaks, found.breaks[0].reason
        assert len(found.graphs) == 1, f"{len(found.graphs)} graphs"
        assert any("mamba_ops" in op for op in found.graphs[0].ops), "none of our ops"

    def with_cache(length: int) -> None:
        out = it.model(it.tokens[:, :5], use_cache=True)
        trace(it.tokens[:, 5 : 5 + length], use_cache=True, **cache_of(out))

    calls: dict[str, Callable[[], None]] = {
        "prefill": lambda: trace(it.tokens, use_cache=False),
        "packed": lambda: trace(it.tokens[:1], use_cache=False, **packing()),
        "one step": lambda: with_cache(1),
        "prompt in parts": lambda: with_cache(7),
    }
    assert tuple(calls) == TRACES
    with use_mamba_ops(it.model):
        return {title: _said(call) for title, call in calls.items()}


def section(device: str) -> str:
    """Return what all checks of all models say on a CPU, or for a device that is not there, as a section of a page."""
    import transformers

    here = device == "cpu"
    columns = tuple(CHECKS) if here else TRACES
    notes: list[str] = []
    rows = []
    for name in ALL_MODELS:
        found = check(name) if here else absent.run("compile_tests.models:traced", name, device=device, timeout=3600)
        cells = []
        for column in columns:
            if (said := found[column]) != "yes":
                notes += [said] if said not in notes else []
                said = f"no ({notes.index(said) + 1})"
            cells.append(said)
        rows.append(f"| {name} | {' | '.join(cells)} |")
        sys.stderr.write(f"{rows[-1]}\n")
    head = f"| model | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"
    told = "".join(f"\n{number}. {note}" for number, note in enumerate(notes, 1))
    what = "On a CPU" if here else f"Traced for {device}, which was not there"
    versions = f"Transformers {transformers.__version__}, torch {torch.__version__}"
    command = f"`python -m compile_tests --models{'' if here else f' --device {device}'}`"
    return "\n".join((f"## {what}", "", f"{versions}; {command}.", "", head, *rows, "", told)).rstrip() + "\n"
