"""Checks that Mamba-3's ops share: shapes of a call's tokens, and of its four caches."""

from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.checking import count_of, shape_is, tensor_rank
from mamba_ops.registry import bad_argument

TOKENS = ("x", "dt", "A", "trap", "angles", "B", "C")
CACHES = ("angle_state", "ssm_state", "k_state", "v_state")


def output_shape(x: Tensor, mimo_x: Tensor | None, mimo_o: Tensor | None) -> tuple[int, ...]:
    """Return the shape of what a call returns."""
    if mimo_x is None or mimo_o is not None or x.dim() < 2 or mimo_x.dim() < 2:
        return tuple(x.shape)
    return *x.shape[:-2], mimo_x.shape[1], *x.shape[-2:]


def check_tokens(call: Any) -> None:
    """Raise the ValueError about a tensor that does not fit x, whose rank is right."""
    *lead, heads, dim = call.x.shape
    rank = _check_rank(call, heads, dim)
    more = 1 if rank else 0
    axes = "(..., rank, groups, dstate), as mimo_x is given" if rank else "(..., groups, dstate)"
    tensor_rank("B", call.B, {call.x.dim() + more: f"like x: {axes}"})
    tensor_rank("angles", call.angles, {call.x.dim() - 1: "(..., angles), one set for all heads"})
    (groups, dstate), angles = call.B.shape[-2:], call.angles.shape[-1]
    for name, tensor, sizes in (("x", call.x, (heads, dim)), ("B", call.B, (groups, dstate))):
        if 0 in sizes:
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected="only tokens of size 0")
    for name in ("dt", "A", "trap"):
        shape_is(name, getattr(call, name), (*lead, heads), hint="one number a token and head of x")
    shape_is("angles", call.angles, (*lead, angles), hint="tokens are those of x")
    if not 1 <= angles <= dstate // 2:
        expected = f"1 to {dstate // 2} angles, one for a pair of the {dstate} numbers of B"
        raise bad_argument("angles", got=f"{angles} angles", expected=expected)
    hint = "tokens are those of x" + (", the rank is that of mimo_x" if rank else "")
    shape_is("B", call.B, (*lead, *rank, groups, dstate), hint=hint)
    shape_is("C", call.C, tuple(call.B.shape), hint="C is like B")
    if heads % groups:
        raise bad_argument("B", got=f"{groups} groups", expected=f"a divisor of the {heads} heads")
    for name in ("B_bias", "C_bias"):
        shape_is(name, getattr(call, name), (heads, *rank, dstate))
    shape_is("D", call.D, (heads,))
    shape_is("z", call.z, tuple(call.x.shape), hint="z is like x")
    hint = "out has the rank's outputs, as mimo_o is none" if rank and call.mimo_o is None else "out is like x"
    shape_is("out", call.output, output_shape(call.x, call.mimo_x, call.mimo_o), hint=hint)


def _check_rank(call: Any, heads: int, dim: int) -> tuple[int, ...]:
    """Return the rank of a MIMO call, and nothing of a SISO one, or raise the ValueError about one of its weights."""
    if call.mimo_x is None:
        for name in ("mimo_z", "mimo_o"):
            if getattr(call, name) is not None:
                raise bad_argument(name, got="a tensor", expected="None without mimo_x")
        return ()
    tensor_rank("mimo_x", call.mimo_x, {3: "(heads, rank, dim)"})
    rank = call.mimo_x.shape[1]
    if not rank:
        raise bad_argument("mimo_x", got="a rank of 0", expected="1 at least", hint="None is for one input a head")
    for name in ("mimo_x", "mimo_z", "mimo_o"):
        shape_is(name, getattr(call, name), (heads, rank, dim), hint="heads and dim are those of x")
    if (call.z is None) != (call.mimo_z is None):
        got, expected = ("None", "a tensor, as z is given") if call.mimo_z is None else ("a tensor", "None without z")
        raise bad_argument("mimo_z", got=got, expected=expected)
    return (rank,)


def cache_sizes(call: Any) -> dict[str, tuple[int, ...]]:
    """Return the sizes of one slot of each cache, by name, for a call whose tokens fit."""
    (heads, dim), dstate, angles = call.x.shape[-2:], call.B.shape[-1], call.angles.shape[-1]
    rank = () if call.mimo_x is None else call.mimo_x.shape[1:2]
    sizes = {"ssm_state": (heads, dim, dstate), "angle_state": (heads, angles)}
    return {**sizes, "k_state": (*rank, heads, dstate), "v_state": (heads, dim)}


def check_caches(call: Any) -> None:
    """Raise the ValueError about one of the four caches."""
    count = count_of(call.ssm_state)
    for name, size in cache_sizes(call).items():
        cache: Tensor = getattr(call, name)
        shape_is(name, cache, (count, *size), hint="all four caches have as many slots")


def unsupported_by_triton(x: Tensor, mimo_x: Tensor | None) -> str | None:
    """Takes one input and output a head (no mimo_x), and no float64 x: other calls run on the ops inside."""
    if mimo_x is not None:
        return "takes one input and output a head, and mimo_x gives it several"
    return "computes in float32, and x is float64" if x.dtype == torch.float64 else None
