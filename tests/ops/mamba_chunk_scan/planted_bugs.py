"""Bugs to plant in mamba_chunk_scan."""

BUGS = {
    "wrong group": ("head // (HEADS // GROUPS)", "head % GROUPS"),
    "softplus always": ("    if SOFTPLUS:", "    if True:"),
    "dt not limited": ("tl.minimum(tl.maximum(d, dt_min), dt_max)", "d"),
    "tokens not decayed to the piece's end": ("tl.exp2(to_log2(left)) * d", "d"),
    "state not decayed over a piece": (
        "tl.dot(tl.trans(pushed), b, s * tl.exp2(left)[:, None]",
        "tl.dot(tl.trans(pushed), b, s",
    ),
    "state decayed as over the next piece": ("left = next_left\n\n        if D", "left = left\n\n        if D"),
    "token does not read itself": ("place[:, None] >= place[None, :]", "place[:, None] > place[None, :]"),
    "state before the piece not read": (
        'tl.dot(c, tl.trans(s.to(OPERAND)), input_precision="ieee")',
        'tl.dot(c, tl.trans(0.0 * s.to(OPERAND)), input_precision="ieee")',
    ),
    "state of the segment before not read": ("s += tl.load(starts", "s += 0.0 * tl.load(starts"),
    "segments begin with the initial state": ("carried & (several == 0)", "carried"),
    "state not decayed before a segment": (
        "tl.trans(u.to(OPERAND)), b, s * tl.exp2(left)",
        "tl.trans(u.to(OPERAND)), b, s",
    ),
    "factors of steps mixed up": ("2 * bit[:, None] + bit[None, :]", "bit[:, None] + 2 * bit[None, :]"),
    "segments count from the row's first": ("first_start(piece_number, SEGMENT) + segment", "segment"),
}

SLOW_BUGS = {  # slow: interpreted matrix products
    "initial state not read": ("carried = load_flag(", "carried = 0 * load_flag("),
    "chunks do not end at absolute positions": ("before = tl.load", "before = 0 * tl.load"),
    "null rows not zeroed": ("zeros = tl.zeros(", "zeros = 1.0 + tl.zeros("),
    "bias dropped": ("d += tl.load(dt_bias", "d += 0.0 * tl.load(dt_bias"),
    "state of the next chunk": (
        "number = first_chunk + piece // PER_CHUNK",
        "number = first_chunk + (piece + 1) // PER_CHUNK",
    ),
    "last chunk's state not kept": (" | (high == count)", " & (high < count)"),
    "pieces go on past their chunk": ("tl.minimum(low + PIECE, (chunk + 1) * CHUNK - before)", "low + PIECE"),
    "null slot ignored": (
        "source = load_slot(row, slots, slots_stride, null_slot, slot_count)",
        "source = load_slot(row, slots, slots_stride, -1, slot_count)",
    ),
    "null destination written": ("write_stride, null_slot, slot_count)", "write_stride, -1, slot_count)"),
    "write slots ignored": ("count, write_slots, write_stride", "count, write_slots, -1"),
    "empty row resets its state": ("source, count, write_slots", "source, count + 1, write_slots"),
    "D dropped": ("y += u.to(tl.float32) * skip", "y += 0.0 * skip"),
    "gate without sigmoid": ("y *= gate * tl.sigmoid(gate)", "y *= gate"),
}
