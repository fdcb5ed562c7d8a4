"""Bugs to plant in chunk_kda."""

BUGS = {
    "wrong group": ("head // (V_HEADS // K_HEADS)", "head % K_HEADS"),
    "not normalised": ("    if L2NORM:", "    if False:"),
    "system without beta": ("known * strength[:, None]", "known"),
    "values without beta": ("(new * strength[None, :])", "new"),
    "keys within a part not decayed": ("(keys * tl.exp2(half - within))", "(keys * tl.exp2(half))"),
    "parts between not decayed": ("operand, PRECISION) + before)", "operand, PRECISION))"),
    "pairs of a part not decayed": ("exponents + next_one[None, :], 0.0)", "exponents, 0.0)"),
    "rows of a part decayed twice": ("half = tl.exp2(within - half)", "half = tl.exp2(within)"),
    "keys not decayed from the beginning": (
        "tl.store(place, keys * tl.exp2(before + within))",
        "tl.store(place, keys * tl.exp2(within))",
    ),
    "keys not decayed to the end": ("operand, PRECISION) + later))", "operand, PRECISION)))"),
    "state not decayed over a chunk": ("s * decay[None, :]", "s"),
    "token does not read itself": ("tl.where(up_to, weight, 0.0)", "tl.where(i[:, None] > i[None, :], weight, 0.0)"),
    "initial state not read": ("load_flag(row, has_initial_state, initial_stride)", "(slot_stride < -1)"),
}

SLOW_BUGS = {  # slow: interpreted matrix products
    "later parts not zeroed": ("for other in range(part + 1, PARTS):", "for other in range(PARTS, PARTS):"),
    "own decay counted in the rest": ("after = i[:, None] < i[None, :]", "after = i[:, None] <= i[None, :]"),
    "own decay not counted from the beginning": ("up_to = i[:, None] >= i[None, :]", "up_to = i[:, None] > i[None, :]"),
    "decay of the whole without later parts": ("tl.exp2(within + later), i", "tl.exp2(within), i"),
    "state before a chunk not read": (
        "y = tl.dot(known, tl.trans(queries)",
        "y = 0.0 * tl.dot(known, tl.trans(queries)",
    ),
    "what is known written again": ("tl.float32) - tl.dot(known", "tl.float32) - 0.0 * tl.dot(known"),
    "state read by rows that have none": ("load_flag(row, has_initial_state, initial_stride)", "(slot_stride >= 0)"),
    "second chunk read as the first": ("weights += V_HEADS * CHUNK * CHUNK", "weights += 0"),
    "scale dropped": ("length_factor(queries, L2NORM) * scale", "length_factor(queries, L2NORM)"),
    "null rows not zeroed": ("tl.zeros([CHUNK, BLOCK], tl.float32), (t", "1.0, (t"),
    "null slot ignored": ("slots_stride, null_slot, slot_count)", "slots_stride, -1, slot_count)"),
    "write slots ignored": ("count, write_slots, write_stride", "count, None, write_stride"),
    "null destination written": ("write_stride, null_slot, slot_count)", "write_stride, -1, slot_count)"),
    "empty row's state not copied": ("stored &= slot_stride >= 0", "stored &= (slot_stride >= 0) & (count > 0)"),
    "empty row's state reset": ("source, count, write_slots", "source, count + 1, write_slots"),
}
