"""Bugs to plant in chunk_kda."""

BUGS = {
    "wrong group": ("head // (V_HEADS // K_HEADS)", "head % K_HEADS"),
    "not normalised": ("    if L2NORM:", "    if False:"),
    "system without beta": ("known * strength[:, None]", "known"),
    "values without beta": ("(values * strength[:, None])", "values"),
    "keys within a part not decayed": ("(keys * tl.exp2(-within))", "keys"),
    "parts between not decayed": (
        "tl.cumsum(later, 0, reverse=True) + between[None, :]",
        "tl.cumsum(later, 0, reverse=True)",
    ),
    "pairs of a part not decayed": ("exponents + later[None, :], 0.0)", "exponents, 0.0)"),
    "all parts moderate": ("tl.min(within) > -MODERATE", "True"),
    "state not decayed over a chunk": ("s * decay[None, :]", "s"),
    "token does not read itself": ("i[:, None] >= i[None, :], weight", "i[:, None] > i[None, :], weight"),
    "initial state not read": ("load_flag(row, has_initial_state, initial_stride)", "(slot_stride < -1)"),
}

SLOW_BUGS = {  # slow: interpreted matrix products
    "later parts not zeroed": ("for other in range(part + 1, PARTS):", "for other in range(PARTS, PARTS):"),
    "own decay counted in the rest": ("g, t + 1, low, tl.minimum(low + CHUNK", "g, t, low, tl.minimum(low + CHUNK"),
    "first of a part not in the sum": ("(tl.sum(later, 0) + opener)", "tl.sum(later, 0)"),
    "tokens of the next row decay": ("tl.minimum(first + _PART, high)", "first + _PART"),
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
