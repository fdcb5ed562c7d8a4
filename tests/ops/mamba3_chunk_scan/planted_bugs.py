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
