"""Bugs to plant in selective_scan."""

BUGS = {
    "wrong group": ("group = program // BLOCKS % GROUPS", "group = program // BLOCKS % GROUPS * 0"),
    "softplus always": ("    if SOFTPLUS:", "    if True:"),
    "bias dropped": ("        d += bias", "        d += 0 * bias"),
    "D dropped": ("y = tl.fma(value, skip, y)", "y = tl.fma(value, 0 * skip, y)"),
    "gate without sigmoid": (
        "y *= silu(gate, output.dtype.element_ty.primitive_bitwidth)",
        "y *= gate",
    ),
    "half the decay": ("tl.exp2(rates[number] * step)", "tl.exp2(0.5 * rates[number] * step)"),
    "natural exponential": ("tl.exp2(rates[number] * step)", "tl.exp(rates[number] * step)"),
    "initial state not read": (
        "elif load_flag(row, has_initial_state, initial_stride):",
        "elif slot_stride < -1:",
    ),
    "state read by rows that have none": (
        "elif load_flag(row, has_initial_state, initial_stride):",
        "elif slot_stride >= 0:",
    ),
    "null rows not zeroed": ("tl.zeros([BLOCK], tl.float32), in_dim", "1.0, in_dim"),
    "write slots ignored": ("row, write_slots, write_stride", "row, write_slots, -1"),
    "null destination written": (
        "write_slots, write_stride, null_slot, slot_count)\n            stored",
        "write_slots, write_stride, -1, slot_count)\n            stored",
    ),
    "chunks not decayed": (
        "tl.fma(s[number], tl.exp2(rates[number] * total), left[number])",
        "s[number] + left[number]",
    ),
    "chunks begin with nothing": ("tl.store(place, s, in_dim)", "tl.store(place, 0 * s, in_dim)"),
    "step sizes of one token": ("        total += step", "        total = step"),
    "segments begin with the row's state": (
        "there & ((number + ahead) % segment == 0)",
        "there & (number + ahead == 0)",
    ),
    "chunks count what came before twice": ("left = zeros(rates[0], WIDTH)", "left = s"),
    "empty row's state not copied": ("if count <= 0:  # no token", "if False:  # no token"),
    "states of the prefix cache a block late": (
        "column = (position - 1) // block_size",
        "column = position // block_size",
    ),
    "short first chunk from the block's start": ("tl.maximum(block_size - (high - low), 0)", "0"),
    "prefix cache's last state in the first column": (
        "column = tl.load(last_block + row)",
        "column = 0 * tl.load(last_block + row)",
    ),
}

CPP_BUGS = {
    "wrong group": ("group = first / (dim / groups)", "group = 0"),
    "softplus always": ("if (is_softplus)", "if (true)"),
    "bias dropped": ("if (bias) d += added", "if (false) d += added"),
    "D dropped": ("y += skip * u", "y += 0 * skip * u"),
    "gate dropped": ("if (z) y *=", "if (false) y *="),
    "natural exponential": ("exp2(rates[j] * d)", "exp(rates[j] * d)"),
    "second tile from the first one's place": ("place = begin + t0;", "place = begin;"),
    "initial state not read": ("const bool begun = state &&", "const bool begun = false && state &&"),
    "null rows not zeroed": ("std::memset(ys, 0, 4 * LANES * TILE)", "std::fill(ys, ys + LANES * TILE, 1.0f)"),
    "write slots ignored": ("write_slots.table ? write_slots.at(row) : source", "source"),
    "empty row's state not copied": ("(length == 0 && target == source)", "length == 0"),
    "packed rows from the start": ("begin = rows.begin(row);", "begin = 0;"),
    "channels of a block not the last ones": (
        "std::min(LANES, width - within)",
        "std::min(LANES, width - within) / 8 * 8",
    ),
}
