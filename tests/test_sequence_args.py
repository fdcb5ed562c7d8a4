"""SequenceArgs, DecodeArgs and PlanTensors: every op of their kind takes them, and null slots have one default."""

import torch

from mamba_ops.ops import NULL_SLOT, causal_conv1d_update
from mamba_ops.ops._common.sequences import DecodeArgs, PlanTensors, SequenceArgs
from mamba_ops.registry import ops


def test_every_op_takes_the_arguments_of_its_kind() -> None:
    kinds = {SequenceArgs: "has_initial_state", DecodeArgs: "num_accepted_tokens", PlanTensors: "counts"}
    found: dict[type, list[str]] = {kind: [] for kind in kinds}
    for op in ops().values():
        names = {p.name for p in op.parameters}
        if op.namespace == "mamba_ops" and "null_slot" in names:
            kind = PlanTensors if "counts" in names else next(k for k, n in kinds.items() if n in names)
            found[kind].append(op.name)
            assert names >= set(kind._fields), op.name
    assert {kind.__name__: len(names) for kind, names in found.items()} == {
        "SequenceArgs": 6,
        "DecodeArgs": 5,
        "PlanTensors": 6,
    }


def test_ops_and_layers_have_one_default_of_null_slot() -> None:
    defaults = [p.default for op in ops().values() for p in op.parameters if p.name == "null_slot"]
    assert len(defaults) >= 10
    assert set(defaults) == {NULL_SLOT, SequenceArgs().null_slot, DecodeArgs().null_slot}


def test_bound_arguments_are_the_flat_keywords() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8, 4)
    states = [torch.randn(4, 3, 8).transpose(1, 2)]
    states.append(states[0].clone())
    slots = torch.tensor([2, 0, 1])

    def bound(x: torch.Tensor, state: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return DecodeArgs(slots, null_slot=0).bind(causal_conv1d_update)(x, state, weight) + 1

    with torch.no_grad():
        compiled = torch.compile(bound, fullgraph=True, backend="aot_eager")(x, states[0], slots)
        flat = causal_conv1d_update(x, states[1], weight, slots=slots, null_slot=0) + 1
    assert torch.equal(compiled, flat)
    assert torch.equal(states[0], states[1])
    assert (flat[1] == 1).all()  # padding
