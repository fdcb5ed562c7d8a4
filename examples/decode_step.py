"""Decode with a Mamba-2 mixer: one compiled graph for every batch size, on each backend that this machine has.

Run it with `python examples/decode_step.py`. Without a GPU, `TRITON_INTERPRET=1` adds the Triton kernels, interpreted.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mamba_ops


class Mixer(nn.Module):
    """A Mamba-2 token mixer. Its caches are buffers of `slots` rows; each call says which slot belongs to which row."""

    conv_state: Tensor
    ssm_state: Tensor

    def __init__(self, *, hidden: int, heads: int, dim: int, dstate: int, groups: int, width: int, slots: int) -> None:
        super().__init__()
        self.heads = (heads, dim)
        self.groups = (groups, dstate)
        self.convolved = [heads * dim, groups * dstate, groups * dstate]  # x, B, C
        self.projected = [heads * dim, sum(self.convolved), heads]  # z, xBC, dt
        self.in_proj = nn.Linear(hidden, sum(self.projected), bias=False)
        self.conv = nn.Conv1d(sum(self.convolved), sum(self.convolved), width, groups=sum(self.convolved))
        self.A_log = nn.Parameter(torch.rand(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.out_proj = nn.Linear(heads * dim, hidden, bias=False)
        self.register_buffer("conv_state", torch.zeros(slots, width - 1, sum(self.convolved)).transpose(1, 2))
        self.register_buffer("ssm_state", torch.zeros(slots, heads, dim, dstate))

    def forward(self, hidden: Tensor, slots: Tensor) -> Tensor:
        """Advance every row by one token: hidden is (rows, hidden), slots is (rows,)."""
        z, xBC, dt = self.in_proj(hidden).split(self.projected, dim=1)
        xBC = mamba_ops.causal_conv1d_update(
            xBC, self.conv_state, self.conv.weight.squeeze(1), self.conv.bias, slots=slots
        )
        x, B, C = xBC.split(self.convolved, dim=1)
        y = mamba_ops.selective_state_update(
            self.ssm_state,
            x.unflatten(1, self.heads),
            dt,
            -self.A_log.exp(),
            B.unflatten(1, self.groups),
            C.unflatten(1, self.groups),
            D=self.D,
            z=z.unflatten(1, self.heads),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            slots=slots,
        )
        return self.out_proj(y.flatten(1))


def decode(step: Callable[..., Tensor], mixer: Mixer, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Run the batches from empty caches and return all outputs."""
    mixer.conv_state.zero_()
    mixer.ssm_state.zero_()
    return torch.cat([step(hidden, slots) for hidden, slots in batches])


@torch.no_grad()  # the ops record no gradients, and parameters require them
def main() -> None:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(0)
    mixer = Mixer(hidden=128, heads=4, dim=64, dstate=32, groups=1, width=4, slots=16).to(device)
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True)
    tables = ([3, 7, 0, 12], [3, 7, 12, 5, 9, 14], [7, 12, -1])  # requests come and go; -1 is a padding row
    batches = [(torch.randn(len(t), 128, device=device), torch.tensor(t, device=device)) for t in tables]

    sample = mamba_ops.selective_state_update.make_samples(device)[0]
    print(mamba_ops.explain("selective_state_update", *sample.args, **sample.kwargs), "\n")
    with mamba_ops.use_backend("torch"):
        expected = decode(mixer, mixer, batches)

    for backend in mamba_ops.registry.backends():
        with mamba_ops.use_backend(backend.name), mamba_ops.record_selections() as runs:
            if mamba_ops.explain("selective_state_update", *sample.args, **sample.kwargs).backend != backend.name:
                continue  # not on this machine
            difference = (decode(compiled, mixer, batches) - expected).abs().max().item()
        ran = ", ".join(f"{run.op} on {run.backend}" for run in runs[:2])
        print(f"{backend.name}: {ran}; within {difference:.1e} of eager torch")
    print(f"graphs compiled for all of this: {counters['stats']['unique_graphs']}")


if __name__ == "__main__":
    main()
