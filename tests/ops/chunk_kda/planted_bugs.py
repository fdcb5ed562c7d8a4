"""Bugs to plant in chunk_kda."""

BUGS = {
    "wrong group": ("head // (V_HEADS // K_HEADS)", "head % K_HEADS"),
    "not normalised": ("    if L2NORM:", "    if False:"),
    "system without beta": ("known * strength[None, :], CHUNK", "known, CHUNK"),
    "values without beta": ("PRECISION) * strength[:, None]", "PRECISION)"),
    "keys within a chunk not decayed": ("keys * tl.exp2(undone)", "tl.where(is_steep[None, :], 0.0, keys)"),
    "keys within a block not decayed": ("undone = tl.exp2(since), tl.exp2(-since)", "undone = tl.exp2(since), 1.0"),
    "readers within a block not decayed": ("undone = tl.exp2(since), tl.exp2(-since)", "undone = 1.0, tl.exp2(-since)"),
    "keys of a half not decayed": ("left, left, apart", "left, 1.0, apart"),
    "queries of steep blocks not decayed": ("(queries * reading)", "(queries * 1.0)"),
    "first half decayed to its end": ("tl.where((half == 1)[:, None], between, since)", "between"),
    "keys not decayed from the beginning": ("ALIGNED), keys * opened)", "ALIGNED), keys)"),
    "keys not decayed to the end": ("keys * tl.exp2(left)", "keys"),
    "state not decayed over a chunk": ("s * decay[None, :]", "s"),
    "token does not read itself": ("i[:, None] >= i[None, :], weight", "i[:, None] > i[None, :], weight"),
    "token does not read itself where decays are steep": ("(apart >= 0) & (blocks > 0)", "(apart > 0) & (blocks > 0)"),
    "steep blocks dropped": ("    if blocks > 0:\n        known", "    if blocks < -1:\n        known"),
    "initial state not read": ("load_flag(row, has_initial_state, initial_stride)", "(slot_stride < -1)"),
}

SLOW_BUGS = {  # slow: interpreted matrix products
    "later tokens read": ("tl.where(i[:, None] >= i[None, :], weight, 0.0)", "weight"),
    "blocks before counted twice": ("apart >> bits == 1, OPERAND", "apart >> bits >= 1, OPERAND"),
    "own decay counted in the rest": ("to_logs(_load_fours(g, t + 1, low,", "to_logs(_load_fours(g, t, low,"),
    "own decay not counted from the beginning": (
        "to_logs(_load_fours(g, t, low,",
        "to_logs(_load_fours(g, t - 1, low,",
    ),
    "decay of the first token for the whole": ("tl.exp2(before))", "tl.exp2(to_logs(opener.to(tl.float32))))"),
    "state before a chunk not read": (
        "y = tl.dot(known, tl.trans(queries)",
        "y = 0.0 * tl.dot(known, tl.trans(queries)",
    ),
    "what is known written again": ("(lacking - tl.dot(known", "(lacking - 0.0 * tl.dot(known"),
    "state read by rows that have none": ("load_flag(row, has_initial_state, initial_stride)", "(slot_stride >= 0)"),
    "second chunk read as the first": ("solved += V_HEADS * 2 * CHUNK * CHUNK", "solved += 0"),
    "scale dropped": ("_of_length_1(queries, L2NORM) * scale", "_of_length_1(queries, L2NORM)"),
    "null rows not zeroed": ("tl.zeros([CHUNK, BLOCK], tl.float32), (t", "1.0, (t"),
    "null slot ignored": ("slots_stride, null_slot, slot_count)", "slots_stride, -1, slot_count)"),
    "write slots ignored": ("count, write_slots, write_stride", "count, write_slots, -1"),
    "null destination written": ("write_stride, null_slot, slot_count)", "write_stride, -1, slot_count)"),
    "empty row's state not copied": ("stored &= slot_stride >= 0", "stored &= (slot_stride >= 0) & (count > 0)"),
    "empty row's state reset": ("source, count, write_slots", "source, count + 1, write_slots"),
}
