"""Checks that Mamba-3's ops share: shapes of a call's tokens, and of its four caches."""

from typing import Any

from torch import Tensor

from mamba_ops.ops._common.checking import count_of, shape_is, tensor_rank
from mamba_ops.registry import bad_argument

CACHES = ("angle_state", "ssm_state", "k_state", "v_state")


def check_tokens(call: Any) -> None:
    """Raise the ValueError about a tensor that does not fit x, whose rank is right."""
    *lead, heads, dim = call.x.shape
    tensor_rank("B", call.B, {call.x.dim(): "like x: (..., groups, dstate)"})
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
    shape_is("B", call.B, (*lead, groups, dstate), hint="tokens are those of x")
    shape_is("C", call.C, tuple(call.B.shape), hint="C is like B")
    if heads % groups:
        raise bad_argument("B", got=f"{groups} groups", expected=f"a divisor of the {heads} heads")
    for name in ("B_bias", "C_bias"):
        shape_is(name, getattr(call, name), (heads, dstate))
    shape_is("D", call.D, (heads,))
    shape_is("z", call.z, tuple(call.x.shape), hint="z is like x")
    shape_is("out", call.output, tuple(call.x.shape), hint="out is like x")


def check_caches(call: Any) -> None:
    """Raise the ValueError about one of the four caches."""
    (heads, dim), dstate, angles = call.x.shape[-2:], call.B.shape[-1], call.angles.shape[-1]
    count = count_of(call.ssm_state)
    sizes = {"ssm_state": (heads, dim, dstate), "angle_state": (heads, angles)}
    for name, size in {**sizes, "k_state": (heads, dstate), "v_state": (heads, dim)}.items():
        cache: Tensor = getattr(call, name)
        shape_is(name, cache, (count, *size), hint="all four caches have as many slots")
