"""Bugs to plant in chunk_gated_delta_rule."""

BUGS = {
    "wrong group": ("head // (V_HEADS // K_HEADS)", "head % K_HEADS"),
    "not normalised": ("    if L2NORM:", "    if False:"),
    "system without beta": ("(down * (of_key * strength))[None, :]", "(down * of_key)[None, :]"),
    "inverse without beta": ("(until * strength)[:, None]", "until[:, None]"),
    "what is between tokens not decayed": ("near[:, None] - near[None, :]", "0.0 * near[:, None]"),
    "last token of a part not solved": ("for j in range(_PART - 1):", "for j in range(_PART - 2):"),
    "state not decayed over a chunk": ("s * decay", "s"),
    "tokens not decayed to the chunk's end": ("tl.exp2(to_log2(left))", "1.0"),
    "what is known written again": ("tl.store(factors + i, since * of_key)", "tl.store(factors + i, 0.0 * of_key)"),
    "token does not read itself": ("i[:, None] >= i[None, :]", "i[:, None] > i[None, :]"),
    "initial state not read": ("load_flag(row, has_initial_state, initial_stride)", "(slot_stride < -1)"),
}

SLOW_BUGS = {  # slow: interpreted matrix products
    "parts below the diagonal dropped": ("n = tl.dot(whole, rest,", "n = 0.0 * tl.dot(whole, rest,"),
    "state before a chunk read as it is at its end": ("CHUNK + i, since * of_query)", "CHUNK + i, of_query)"),
    "state read by rows that have none": (
        "load_flag(row, has_initial_state, initial_stride)",
        "(slot_stride >= 0)",
    ),
    "second chunk read as the first": ("solved += V_HEADS * 2 * CHUNK * CHUNK", "solved += 0"),
    "corner of the inverse wrong": ("whole += tl.dot(square,", "whole += 0.0 * tl.dot(square,"),
    "scale dropped": ("length_factor(queries, L2NORM) * scale", "length_factor(queries, L2NORM)"),
    "null rows not zeroed": ("tl.zeros([CHUNK, BLOCK], tl.float32), (t", "1.0, (t"),
    "null slot ignored": ("slots_stride, null_slot, slot_count)", "slots_stride, -1, slot_count)"),
    "write slots ignored": ("count, write_slots, write_stride", "count, write_slots, -1"),
    "null destination written": ("write_stride, null_slot, slot_count)", "write_stride, -1, slot_count)"),
    "empty row's state not copied": ("stored &= slot_stride >= 0", "stored &= (slot_stride >= 0) & (count > 0)"),
    "empty row's state reset": ("source, count, write_slots", "source, count + 1, write_slots"),
}
