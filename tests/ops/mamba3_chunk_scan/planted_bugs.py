"""Bugs to plant in mamba3_chunk_scan."""

BUGS = {
    "states of the first token": ("last = (rows.ends - 1)", "last = (rows.starts)"),
    "no row goes on": ("state = State(", "state = None and State("),
    "B's bias dropped": ("(call.B, call.B_bias)", "(call.B, None)"),
    "padding not zeroed": ("torch.where(ends.is_active[rows.row].view(of_token), y, 0)", "y"),
    "C's bias dropped": ("(call.C, call.C_bias)", "(call.C, None)"),
    "B and C swapped": ("k, q = (", "q, k = ("),
    "rate and step swapped": ("(call.x, call.dt, call.A,", "(call.x, -call.A, -call.dt,"),
    "gate dropped": ("None if call.z is None else packed(call.z)", "None"),
    "skip dropped": ("x, call.D, ", "x, None, "),
    "angles not kept": ('"angle_state": found.angle[last], ', ""),
    "angles of the first row": ("found.angle[last]", "found.angle[last[:1]].expand(last.shape[0], -1, -1)"),
    "k not turned": ("found.k[last]", "tokens.k[last]"),
    "write slots ignored": ("row_ends(call.slots, call.write_slots,", "row_ends(call.slots, None,"),
    "empty rows keep what is not theirs": ("torch.where(empty, initial, value.to(initial.dtype))", "value"),
    "null slot ignored": ("null_slot=call.null_slot", "null_slot=-1"),
    "tokens past the end written": ("torch.where(rows.owned.view(of_token), y, output)", "y"),
    "weights of gates and outputs swapped": ("call.mimo_z, call.mimo_o", "call.mimo_o, call.mimo_z"),
}

KERNEL_BUGS = {
    "the next token gives nothing": ("weight = early + tl.sigmoid(-next_share) * next_d", "weight = early"),
    "a token's own product has all of its weight": (
        "early[None, :], weight[None, :])",
        "weight[None, :], weight[None, :])",
    ),
    "the last of a chunk does not look on": ("end = high + 1", "end = high"),
    "a token's weight in place of the next one's": ("(at_t + 1) * trap_stride, after", "at_t * trap_stride, after"),
    "the first token forgets the one before": ("s += (last_v * late)", "s += 0 * (last_v * late)"),
    "chunks begin unturned": ("HALF + pair)[None, :] + tl.cumsum", "HALF + pair)[None, :] * 0 + tl.cumsum"),
    "chunks turn by themselves": ("tl.cumsum(steps, 0) - steps", "tl.cumsum(steps, 0)"),
    "the kept angle does not count": ("carried, other=0.0).to(tl.float32) * (1 / _PI)", "carried, other=0.0) * 0.0"),
    "turned the other way": (
        "first * cosine - second * sine, first * sine",
        "first * cosine + second * sine, -first * sine",
    ),
    "k without its bias": ("vectors += bias[None, :]", "vectors += 0.0"),
    "wrong group": ("of_group = head // (HEADS // GROUPS)", "of_group = head % GROUPS"),
    "decay of the state dropped": ("tl.dot(kept, k, s * decay", "tl.dot(kept, k, s"),
    "the state is read as if at once": ("* of_query[None, :]", "* 1.0"),
    "skip dropped": ("y += values.to(tl.float32) * skip", "y += 0.0"),
    "gate not multiplied": ("return y * (tl.maximum(z, -88.0) * tl.sigmoid(z))", "return y * tl.sigmoid(z)"),
    "states of the first token": ("last = (begin + count - 1)", "last = begin"),
    "angle not kept": ("of_angle, angle, is_angle & is_first)", "of_angle, angle, is_angle & (program < 0))"),
    "k of every row's first chunk kept": (
        "ends = (t == high - 1) & is_last",
        "ends = (t == high - 1) & (row >= 0) & (t < 8)",
    ),
    "empty rows keep nothing": ("if stored & (slot_stride >= 0):", "if stored & (slot_stride >= 0) & (count > 0):"),
    "null slot ignored": ("slots_stride, null_slot, slot_count)", "slots_stride, -1, slot_count)"),
}
"""Of the Triton kernels."""

SEEN_BY = {"the last of a chunk does not look on": "packed, more chunks", "padding not zeroed": "null rows"}
"""The sample to try first, where others take seconds and do not see a bug."""
