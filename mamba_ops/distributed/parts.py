"""Which part of a layer each of several ranks has: its sizes there, and its rows or columns of every parameter.

Heads, or channels, are divided evenly, and all that belongs to a head goes with it. What several heads share (a group
of B and C, a head of q and k) goes to every rank that has one of these heads.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mamba_ops.layers import GatedDeltaNet, Mamba, Mamba2, Mamba3, ShortConv


class Slice(NamedTuple):
    """Some rows, or columns, of a parameter."""

    dim: int
    entries: Tensor


class Part(NamedTuple):
    """What one rank has of a layer.

    Attributes:
        sizes: attributes of the layer that are others there.
        slices: by name of parameter; one that is not in it is whole on every rank.
        shared: the rows of its part that its neighbours have too, by name of module.
        sets: how many sets of neighbouring ranks share such rows; 0: none does.
        mine: the number of this rank's set.
        of_all: the rows of its part that all ranks have, by name of module; None: none.
    """

    sizes: dict[str, object]
    slices: dict[str, Slice]
    shared: dict[str, range]
    sets: int = 0
    mine: int = 0
    of_all: dict[str, range] | None = None


def part_of(layer: nn.Module, rank: int, ranks: int) -> Part:
    """Return what a rank has of a layer.

    Raises:
        TypeError: it is none of this package's layers.
        ValueError: its heads, channels or groups cannot be divided evenly.
    """
    for kind, part in _PARTS.items():
        if isinstance(layer, kind) and layer.is_divisible:
            return part(layer, rank, ranks)
    expected = f"a mamba_ops.layers {', '.join(kind.__name__ for kind in _PARTS)}"
    raise TypeError(
        f"tensor_parallel: layer: got a {type(layer).__name__}, expected {expected}; parallelise each by itself"
    )


def _share(what: str, count: int, rank: int, ranks: int) -> range:
    """The heads of a rank."""
    if count % ranks:
        raise ValueError(f"tensor_parallel: got {count} {what} on {ranks} ranks, expected a multiple of the ranks")
    return range(rank * count // ranks, (rank + 1) * count // ranks)


def _shared(what: str, count: int, rank: int, ranks: int) -> range:
    """The groups of a rank: some of its own, or one that it shares with its neighbours."""
    if count % ranks and ranks % count:
        expected = "a multiple of the ranks, or a divisor of them"
        raise ValueError(f"tensor_parallel: got {count} {what} on {ranks} ranks, expected {expected}")
    first = rank * count // ranks
    return range(first, first + max(count // ranks, 1))


def _rows(begin: int, numbers: range, size: int) -> list[int]:
    """The rows of some heads of `size` rows each, in a parameter in which the first head's begin at `begin`."""
    return [*range(begin + numbers.start * size, begin + numbers.stop * size)]


def _slices(**rows: list[int] | tuple[int, list[int]]) -> dict[str, Slice]:
    """Slices by name, `__` for a dot; of rows, or of `(dimension, rows)`."""
    found = {}
    for name, value in rows.items():
        dim, index = value if isinstance(value, tuple) else (0, value)
        found[name.replace("__", ".")] = Slice(dim, torch.tensor(index))
    return found


def _mamba(layer: Mamba, rank: int, ranks: int) -> Part:
    share = _share("channels (d_inner)", layer.d_inner, rank, ranks)
    own, both = [*share], [*share, *_rows(layer.d_inner, share, 1)]
    slices = _slices(
        in_proj__weight=both,
        in_proj__bias=both,
        conv1d__weight=own,
        conv1d__bias=own,
        x_proj__weight=(1, own),
        dt_proj__weight=own,
        dt_proj__bias=own,
        A_log=own,
        D=own,
        out_proj__weight=(1, own),
    )
    return Part({"d_inner": len(share)}, slices, {})


def _mamba2(layer: Mamba2, rank: int, ranks: int) -> Part:
    heads = _share("heads", layer.heads, rank, ranks)
    groups = _shared("groups", layer.groups, rank, ranks)
    d_inner, bc = layer.heads * layer.head_dim, layer.groups * layer.dstate
    own = _rows(0, heads, layer.head_dim)
    of_groups = [_rows(begin, groups, layer.dstate) for begin in (d_inner, d_inner + bc)]
    convolved = own + of_groups[0] + of_groups[1]
    projected = own + [d_inner + row for row in convolved] + _rows(2 * d_inner + 2 * bc, heads, 1)
    slices = _slices(
        in_proj__weight=projected,
        in_proj__bias=projected,
        conv1d__weight=convolved,
        conv1d__bias=convolved,
        dt_bias=[*heads],
        A_log=[*heads],
        D=[*heads],
        norm__weight=own,
        out_proj__weight=(1, own),
    )
    sizes = [len(own), len(of_groups[0]), len(of_groups[1])]
    changed = {"heads": len(heads), "groups": len(groups), "convolved": sizes}
    changed["projected"] = [len(own), sum(sizes), len(heads)]
    of_both = range(len(own), sum(sizes))  # of B and C, among what is convolved
    shared = {"conv1d": of_both, "in_proj": range(len(own) + of_both.start, len(own) + of_both.stop)}
    return _shared_part(changed, slices, shared, layer.groups, ranks, groups)


def _mamba3(layer: Mamba3, rank: int, ranks: int) -> Part:
    heads = _share("heads", layer.heads, rank, ranks)
    groups = _shared("groups", layer.groups, rank, ranks)
    sizes = layer.projected  # z, x, B, C, dt, A, trap, angles
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    own = _rows(0, heads, layer.head_dim)
    of_groups = [  # of B, or of C: its groups, for each number of the rank of MIMO
        row for r in range(layer.mimo_rank) for row in _rows(r * layer.groups * layer.dstate, groups, layer.dstate)
    ]
    parts = [own, own, of_groups, of_groups, [*heads], [*heads], [*heads], [*range(layer.angles)]]
    slices = _slices(
        in_proj__weight=[start + row for start, part in zip(starts, parts, strict=True) for row in part],
        **{name: [*heads] for name in ("dt_bias", "B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o")},
        norm__weight=own,
        out_proj__weight=(1, own),
    )
    projected = [len(part) for part in parts]
    changed = {"heads": len(heads), "groups": len(groups), "projected": projected}
    of_both = {"in_proj": range(2 * len(own), 2 * len(own) + 2 * len(of_groups))}
    part = _shared_part(changed, slices, of_both, layer.groups, ranks, groups)
    return part._replace(of_all={"in_proj": range(sum(projected) - layer.angles, sum(projected))})


def _gated_delta_net(layer: GatedDeltaNet, rank: int, ranks: int) -> Part:
    values = _share("heads of v", layer.num_v_heads, rank, ranks)
    keys = _shared("heads of k", layer.num_k_heads, rank, ranks)
    k_dim, v_dim, of_one = layer.head_k_dim, layer.head_v_dim, layer.num_v_heads // layer.num_k_heads
    all_keys = layer.num_k_heads * k_dim
    own = _rows(0, values, v_dim)
    convolved = _rows(0, keys, k_dim) + _rows(all_keys, keys, k_dim) + [2 * all_keys + row for row in own]
    slices = _slices(conv1d__weight=convolved, dt_bias=[*values], A_log=[*values], out_proj__weight=(1, own))
    if layer.interleaved:
        qkvz, ba = [], []
        for key in keys:  # of each head of k: its q, k, v, gate; and b, a
            here = range(max(values.start - key * of_one, 0), min(values.stop - key * of_one, of_one))
            begin = key * (2 * k_dim + 2 * of_one * v_dim)
            qkvz += [*range(begin, begin + 2 * k_dim)]
            for start in (begin + 2 * k_dim, begin + 2 * k_dim + of_one * v_dim):
                qkvz += _rows(start, here, v_dim)
            for start in (2 * key * of_one, (2 * key + 1) * of_one):
                ba += _rows(start, here, 1)
        slices |= _slices(in_proj_qkvz__weight=qkvz, in_proj_ba__weight=ba)
    else:
        slices |= _slices(
            in_proj_qkv__weight=convolved,
            in_proj_z__weight=own,
            in_proj_b__weight=[*values],
            in_proj_a__weight=[*values],
        )
    local_keys = len(keys) * k_dim
    changed = {"num_k_heads": len(keys), "num_v_heads": len(values), "convolved": [local_keys, local_keys, len(own)]}
    shared = dict.fromkeys(("conv1d", "in_proj_qkvz" if layer.interleaved else "in_proj_qkv"), range(2 * local_keys))
    return _shared_part(changed, slices, shared, layer.num_k_heads, ranks, keys)


def _short_conv(layer: ShortConv, rank: int, ranks: int) -> Part:
    share = _share("channels", layer.out_proj.in_features, rank, ranks)
    own = [*share]
    of_all = [row for part in range(3) for row in _rows(part * layer.out_proj.in_features, share, 1)]
    slices = _slices(
        in_proj__weight=of_all,
        in_proj__bias=of_all,
        conv__weight=own,
        conv__bias=own,
        out_proj__weight=(1, own),
    )
    return Part({}, slices, {})


def _shared_part(
    sizes: dict[str, object], slices: dict[str, Slice], shared: dict[str, range], groups: int, ranks: int, mine: range
) -> Part:
    """A part with the rows that belong to groups; they are shared where there are fewer groups than ranks."""
    return Part(sizes, slices, shared, groups, mine.start) if groups < ranks else Part(sizes, slices, {})


_PARTS: dict[type[nn.Module], Callable[..., Part]] = {
    Mamba: _mamba,
    Mamba2: _mamba2,
    Mamba3: _mamba3,
    GatedDeltaNet: _gated_delta_net,
    ShortConv: _short_conv,
}
