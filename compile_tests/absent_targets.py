"""What compile_tests/test_absent.py traces in its child processes: decode steps on a device that is not there."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import mamba_ops
from compile_tests.test_ops import DAILY_STEPS, step
from mamba_ops import registry
from mamba_ops.audit.absent import Tracer, fake, fake_mode, install
from tests.layers import HIDDEN, KINDS, new_layer


def step_of_each_op(*, device: str) -> dict[str, Any]:
    """Trace one step of every op over three batch sizes with dynamic shapes."""
    found = {}
    for op, pattern in DAILY_STEPS.items():

        def run(*args: Tensor, op: Any = op, **kwargs: Any) -> Tensor:
            return op(*args, **kwargs)

        tracer = Tracer(run, device=device, dynamic=True)
        for rows in (5, 6, 11):
            sample = step(op, pattern, rows)
            out = tracer(*sample.args, **sample.kwargs)
        real = op(*sample.args, **sample.kwargs)
        found[op.name] = dataclasses.asdict(tracer.trace) | {"out": [out.device.type, out.shape == real.shape]}
    return found


def recording(ops: Sequence[str]) -> list[str]:
    """Return what records gradients of ops: a composed one leaves that to what it is made of."""
    return ["mamba_chunk_scan" if op == "mamba3_chunk_scan" else op for op in ops]


def training_step_of_each_layer(*, device: str) -> dict[str, Any]:
    """Trace the forward of every layer's training step over three lengths, and each backward op that it needs; and try
    the pass of autograd that would join them.
    """
    install(device)
    found = {}
    for name, kind in KINDS.items():
        layer = fake(new_layer(name, "cpu"), device).requires_grad_()
        graphs: list[list[str]] = []

        def keep(module: torch.fx.GraphModule, inputs: Any, graphs: list[list[str]] = graphs) -> Any:
            targets = [str(node.target) for node in module.graph.nodes]
            graphs.append([target for target in targets if target.startswith("mamba_ops.")])
            return module.forward

        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=keep)
        for length in (5, 6, 11):
            x = fake(torch.randn(2, length, HIDDEN), device).requires_grad_()
            with fake_mode():
                y = compiled(x)
        reason = None
        try:
            with fake_mode():
                y.sum().backward()
        except RuntimeError as error:
            reason = str(error)
        backwards = {}
        for op in (registry.ops()[op_name].backward_op for op_name in recording(kind.prefill)):
            sample = op.make_samples("cpu")[0]
            with fake_mode():
                made = op.overload(*fake(sample.args, device))
            real = op(*sample.args)
            same = [(g.shape, g.device.type) == (t.shape, device) for g, t in zip(made, real, strict=True)]
            backwards[op.name] = all(same)
        recorded = y.requires_grad and y.device.type == device
        found[name] = {"graphs": graphs, "recorded": recorded, "backwards": backwards, "reason": reason}
    return found


class Decode(torch.nn.Module):
    """Both ops with torch around them, and their caches as buffers."""

    def __init__(self, slots: int = 7, dim: int = 32, heads: int = 4, dstate: int = 16) -> None:
        super().__init__()
        self.heads, self.dstate = heads, dstate
        self.projection = torch.nn.Linear(dim, dim + 2 * dstate + heads)
        self.weight = torch.nn.Parameter(torch.randn(dim, 4))
        self.A_log = torch.nn.Parameter(torch.zeros(heads))
        self.register_buffer("conv_state", torch.zeros(slots, dim, 3))
        self.register_buffer("state", torch.zeros(slots, heads, dim // heads, dstate))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        u, B, C, dt = self.projection(x).split([x.shape[1], self.dstate, self.dstate, self.heads], dim=-1)
        u = mamba_ops.causal_conv1d_update(u, self.conv_state, self.weight, slots=slots)
        u = u.unflatten(-1, (self.heads, -1))
        y = mamba_ops.selective_state_update(
            self.state, u, dt, -self.A_log.exp(), B.unsqueeze(1), C.unsqueeze(1), dt_softplus=True, slots=slots
        )
        return x + y.flatten(1)


def module(*, device: str) -> dict[str, Any]:
    """Trace a module of both ops over three batch sizes."""
    tracer = Tracer(Decode(), device=device, dynamic=True)
    for rows in (5, 6, 3):
        tracer(torch.randn(rows, 32), torch.arange(rows))
    return dataclasses.asdict(tracer.trace)
