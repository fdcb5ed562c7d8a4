"""A raw Triton launch inside a model."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from compile_tests.planted.breaks import Base


@triton.jit
def _double(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, at < n), at < n)


class Launch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        out = torch.empty_like(y)
        _double[(1,)](y, out, y.numel(), BLOCK=32)  # planted
        return out + 1


class LaunchTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) * 2 + 1


@triton.jit
def _per_size(x, y, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, at < SIZE), at < SIZE)


@torch.compiler.disable
def _launch_per_size(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _per_size[(triton.cdiv(x.numel(), 32),)](x, out, x.numel(), BLOCK=32)  # jit
    return out


class CompiledPerSize(Base):
    """A size is a constant of the kernel: every new one is compiled while somebody waits."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return _launch_per_size(y) + 1  # planted


class ToHost(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        host = y.sum().cpu()  # planted
        return y * host.to(y.device)


class ToHostTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return y * y.sum()
