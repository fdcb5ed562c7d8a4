"""Bugs to plant in selective_scan, and calls of it that are wrong."""

import torch

from tests.conftest import ACCELERATOR
from tests.ops.tables import BadInput

BUGS = {
    "wrong group": ("group = program // BLOCKS % GROUPS", "group = program // BLOCKS % GROUPS * 0"),
    "softplus always": ("    if SOFTPLUS:", "    if True:"),
    "bias dropped": ("        d += bias", "        d += 0 * bias"),
    "D dropped": ("y += rhs * skip", "y += 0 * rhs * skip"),
    "gate without sigmoid": ("y *= gate * tl.sigmoid(gate)", "y *= gate"),
    "half the decay": ("tl.exp2(rates[number] * step[None, :])", "tl.exp2(0.5 * rates[number] * step[None, :])"),
    "natural exponential": ("tl.exp2(rates[number] * step[None, :])", "tl.exp(rates[number] * step[None, :])"),
    "initial state not read": (
        "elif is_set(row, has_initial_state, initial_stride):",
        "elif slot_stride < -1:",
    ),
    "state read by rows that have none": (
        "elif is_set(row, has_initial_state, initial_stride):",
        "elif slot_stride >= 0:",
    ),
    "null rows not zeroed": ("tl.zeros([BLOCK], tl.float32), in_dim", "1.0, in_dim"),
    "write slots ignored": ("        elif write_slots is not None:", "        elif False:"),
    "null destination written": (
        "stored = in_dim & (target >= 0) & (target != null_slot)",
        "stored = in_dim & (target >= 0)",
    ),
    "chunks not decayed": ("s * tl.exp2(rate * total) + left", "s + left"),
    "chunks begin with nothing": ("tl.store(place, s, in_dim)", "tl.store(place, 0 * s, in_dim)"),
    "step sizes of one token": ("        total += step", "        total = step"),
    "empty row's state not copied": ("        if count <= 0:", "        if False:"),
    "states of the prefix cache a block late": (
        "column = (position - 1) // block_size",
        "column = position // block_size",
    ),
    "short first chunk from the block's start": ("tl.maximum(block_size - (high - low), 0)", "0"),
    "prefix cache's last state in the first column": ("+ tl.load(last_block + row)", "+ 0 * tl.load(last_block + row)"),
}

BAD_INPUT: list[BadInput] = [
    ("base", "x", lambda x: x[0], r"x: got shape \(37, 24\), expected \(n, length, dim\); packed tokens come"),
    ("packed, long", "x", lambda x: x[None], r"x: got shape \(1, 205, 24\), expected \(tokens, dim\); with cu_seqlens"),
    ("base", "x", lambda x: x.int(), "x: got int32, expected float16"),
    ("base", "dt", lambda d: d[..., :1], r"dt: got shape \(3, 37, 1\), expected \(3, 37, 24\); dt is like x"),
    ("base", "dt", lambda d: d.bool(), "dt: got bool, expected float16"),
    ("base", "A", lambda a: a[:, 0], r"A: got shape \(24,\), expected \(dim, dstate\)"),
    ("base", "A", lambda a: a[:3], r"A: got shape \(3, 8\), expected \(24, 8\); one row a channel of x"),
    ("base", "A", lambda a: a[:, :0], r"A: got shape \(24, 0\), expected no size of 0"),
    ("base", "B", lambda b: b[0, 0], r"B: got shape \(2, 8\), expected \(..., dstate\) or \(..., groups, dstate\)"),
    (
        "base",
        "B",
        lambda b: b[:, 1:],
        r"B: got shape \(3, 36, 2, 8\), expected \(3, 37, 8\) or \(3, 37, 2, 8\); tokens are",
    ),
    (
        "base",
        "B",
        lambda b: b.repeat(1, 1, 4, 1)[:, :, :5],
        r"C: got shape \(3, 37, 2, 8\), expected \(3, 37, 5, 8\); C is like B",
    ),
    ("base", "C", lambda c: c[:1], r"C: got shape \(1, 37, 2, 8\), expected \(3, 37, 2, 8\); C is like B"),
    ("base", "D", lambda d: d[1:], r"D: got shape \(23,\), expected \(24,\)"),
    ("base", "z", lambda z: z[:, 1:], r"z: got shape \(3, 36, 24\), expected \(3, 37, 24\); z is like x"),
    ("base", "dt_bias", lambda b: b[None], r"dt_bias: got shape \(1, 24\), expected \(24,\)"),
    ("packed, long", "cu_seqlens", lambda c: c[None], r"cu_seqlens: got shape \(1, 4\), expected \(n \+ 1,\)"),
    ("packed, long", "cu_seqlens", lambda c: c.float(), "cu_seqlens: got float32, expected int32 or int64"),
    ("base", "ssm_state", lambda s: s[..., 1:], r"ssm_state: got shape \(8, 24, 7\), expected \(8, 24, 8\); \(slots"),
    ("base", "ssm_state", lambda s: s.int(), "ssm_state: got int32, expected float16"),
    ("base", "ssm_state", lambda s: None, "ssm_state: got none, expected a cache; has_initial_state says who reads it"),
    (
        "no slots",
        "ssm_state",
        lambda s: s[:2],
        "ssm_state: got 2 slots, expected at least 3; without slots, row i uses slot i",
    ),
    ("base", "slots", lambda s: s.float(), "slots: got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "slots: got 2 rows, expected at least 3"),
    ("packed, long", "write_slots", lambda s: s[:1], "write_slots: got 1 rows, expected at least 3"),
    ("base", "has_initial_state", lambda h: h.int(), "has_initial_state: got int32, expected bool"),
    ("base", "has_initial_state", lambda h: h[:2], r"has_initial_state: got shape \(2,\), expected \(3,\); one for"),
    ("base", "block_size", lambda b: -1, "block_size: got -1, expected 0 or a positive number of tokens"),
    ("prefix cache", "block_size", lambda b: 0, "first_block: got a tensor, expected none without block_size"),
    (
        "base",
        "block_size",
        lambda b: 16,
        "cu_seqlens: got none, expected a tensor with block_size; the prefix cache keeps",
    ),
    (
        "prefix cache",
        "last_chunk",
        lambda c: None,
        "last_chunk: got none, expected a tensor with block_size; the prefix",
    ),
    ("prefix cache", "chunk_ends", lambda c: c[None], r"chunk_ends: got shape \(1, 7\), expected \(chunks,\)"),
    ("prefix cache", "chunk_ends", lambda c: c.float(), "chunk_ends: got float32, expected int32 or int64"),
    ("prefix cache", "first_block", lambda b: b[1:], r"first_block: got shape \(2,\), expected \(3,\)"),
    (
        "prefix cache",
        "write_slots",
        lambda _: torch.zeros(3, dtype=torch.int64, device=ACCELERATOR),
        "write_slots: got a tensor, expected none with block_size; slots says it all",
    ),
    ("prefix cache", "slots", lambda s: s[:, 0], r"slots: got shape \(3,\), expected \(n, positions\), one column a"),
    ("base", "out", lambda o: o[..., 1:], r"out: got shape \(3, 37, 23\), expected \(3, 37, 24\); out is like x"),
]
