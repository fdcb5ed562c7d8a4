"""Bugs to plant in mamba_chunk_scan."""

BUGS = {
    "wrong group": ("head // (HEADS // GROUPS)", "head % GROUPS"),
    "softplus always": ("    if SOFTPLUS:", "    if True:"),
    "dt not limited": ("tl.minimum(tl.maximum(d, dt_min), dt_max)", "d"),
    "tokens not decayed to the chunk's end": ("tl.exp2(to_log2(left)) * d", "d"),
    "state not decayed over a chunk": ("s *= tl.exp2(tl.load(decay + high - 1))", "s *= 1.0"),
    "token does not read itself": ("token[:, None] >= t[None, :]", "token[:, None] > t[None, :]"),
    "state before the chunk not read": ("    if past > 0:", "    if past > 1:"),
}

SLOW_BUGS = {  # slow: interpreted matrix products
    "initial state not read": ("past |= load_flag(", "past |= 0 * load_flag("),
    "chunks do not end at absolute positions": ("before = tl.load", "before = 0 * tl.load"),
    "null rows not zeroed": ("tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32), written", "1.0, written"),
    "bias dropped": ("d += tl.load(dt_bias", "d += 0.0 * tl.load(dt_bias"),
    "start of a long chunk dropped": ("range(begin, tl.minimum(", "range(first, tl.minimum("),
    "state of the chunk before last": ("(number - 1).to(tl.int64) * kept_stride", "number.to(tl.int64) * kept_stride"),
    "last chunk's state not kept": (
        "        if chunk_states is not None:\n            tl.store(",
        "        if 0:\n            tl.store(",
    ),
    "null slot ignored": (
        "source = load_slot(row, slots, slots_stride, null_slot, slot_count)",
        "source = load_slot(row, slots, slots_stride, -1, slot_count)",
    ),
    "null destination written": ("write_stride, null_slot, slot_count)", "write_stride, -1, slot_count)"),
    "write slots ignored": ("count, write_slots, write_stride", "count, None, write_stride"),
    "empty row resets its state": ("source, count, write_slots", "source, count + 1, write_slots"),
    "D dropped": ("y += u * tl.load(D + head)", "y += 0.0 * u * tl.load(D + head)"),
    "gate without sigmoid": ("y *= gate * tl.sigmoid(gate)", "y *= gate"),
}
