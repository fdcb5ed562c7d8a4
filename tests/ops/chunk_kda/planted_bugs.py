"""Bugs to plant in chunk_kda."""

BUGS = {
    "wrong group": ("head // (V_HEADS // K_HEADS)", "head % K_HEADS"),
    "not normalised": ("    if L2NORM:", "    if False:"),
    "system without beta": ("known * strength[:, None]", "known"),
    "values without beta": ("(new * strength[None, :])", "new"),
    "keys within a chunk not decayed": ("keys * tl.exp2(undone)", "tl.where(is_steep, 0.0, keys)"),
    "keys within a block not decayed": ("undone = tl.exp2(since), tl.exp2(-since)", "undone = tl.exp2(since), 1.0"),
    "readers within a block not decayed": ("undone = tl.exp2(since), tl.exp2(-since)", "undone = 1.0, tl.exp2(-since)"),
    "keys of a half not decayed": ("left, left, apart", "left, 1.0, apart"),
    "queries of steep blocks not decayed": ("(queries * reading)", "(queries * 1.0)"),
    "first half decayed to its end": ("tl.where((half == 1)[:, None], between, since)", "between"),
    "keys not decayed from the beginning": ("tl.store(place, keys * opened)", "tl.store(place, keys)"),
    "keys not decayed to the end": ("keys * tl.exp2(left)", "keys"),
    "state not decayed over a chunk": ("s * decay[None, :]", "s"),
    "token does not read itself": ("tl.where(is_earlier, weight", "tl.where(i[:, None] > i[None, :], weight"),
    "token does not read itself where decays are steep": ("(apart >= 0) & (blocks > 0)", "(apart > 0) & (blocks > 0)"),
    "steep blocks dropped": ("    if blocks > 0:\n        steep_pairs", "    if blocks < -1:\n        steep_pairs"),
    "initial state not read": ("load_flag(row, has_initial_state, initial_stride)", "(slot_stride < -1)"),
}

SLOW_BUGS = {  # slow: interpreted matrix products
    "later tokens read": ("tl.where(is_earlier, weight, 0.0)", "weight"),
    "blocks before counted twice": ("apart >> bits == 1, OPERAND", "apart >> bits >= 1, OPERAND"),
    "own decay counted in the rest": ("load_decays(g, t + 1, low,", "load_decays(g, t, low,"),
    "own decay not counted from the beginning": (
        "since = tl.cumsum(load_decays(g, t, low,",
        "since = tl.cumsum(load_decays(g, t - 1, low,",
    ),
    "decay of the first token for the whole": ("opened, i[:, None] == CHUNK - 1)", "opened, i[:, None] == 0)"),
    "state before a chunk not read": (
        "y = tl.dot(known, tl.trans(queries)",
        "y = 0.0 * tl.dot(known, tl.trans(queries)",
    ),
    "what is known written again": ("tl.float32) - tl.dot(known", "tl.float32) - 0.0 * tl.dot(known"),
    "state read by rows that have none": ("load_flag(row, has_initial_state, initial_stride)", "(slot_stride >= 0)"),
    "second chunk read as the first": ("weights += V_HEADS * CHUNK * CHUNK", "weights += 0"),
    "scale dropped": ("of_query *= scale", "of_query *= 1.0"),
    "null rows not zeroed": ("tl.zeros([CHUNK, BLOCK], tl.float32), (t", "1.0, (t"),
    "null slot ignored": ("slots_stride, null_slot, slot_count)", "slots_stride, -1, slot_count)"),
    "write slots ignored": ("count, write_slots, write_stride", "count, None, write_stride"),
    "null destination written": ("write_stride, null_slot, slot_count)", "write_stride, -1, slot_count)"),
    "empty row's state not copied": ("stored &= slot_stride >= 0", "stored &= (slot_stride >= 0) & (count > 0)"),
    "empty row's state reset": ("source, count, write_slots", "source, count + 1, write_slots"),
}
