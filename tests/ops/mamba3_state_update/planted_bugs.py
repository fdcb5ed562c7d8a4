"""Bugs to plant in mamba3_state_update."""

BUGS = {
    "the token before dropped": ("both(v_before *", "both(0 * v_before *"),
    "weights swapped": ("(1 - early) * dt / LEAST", "early * dt / LEAST"),
    "angles not added": ("near_zero(state.angle + math.pi", "near_zero(math.pi"),
    "padding not zeroed": ("torch.where(ends.is_active[rows.row].view(of_token), y, 0)", "y"),
    "B's bias dropped": ("(call.B, call.B_bias)", "(call.B, None)"),
    "C's bias dropped": ("(call.C, call.C_bias)", "(call.C, None)"),
    "k of before turned again": ("both(k_before, k)", "both(ranks.rotate(k_before, angle), k)"),
    "q is k": ("\n    early, rank", "\n    q = k\n    early, rank"),
    "skip dropped": ("x, call.D, None if", "x, None, None if"),
    "gate dropped": ("None if call.z is None else packed(call.z)", "None"),
    "null slot ignored": ("call.write_slots, call.null_slot,", "call.write_slots, -1,"),
    "k not kept": ("(call.k_state, k if is_mimo else k[:, 0]), ", ""),
    "later inputs of a rank not read": ("if rank > 1:", "if rank > 99:"),
    "write slots ignored": ("tables = (call.slots, call.write_slots,", "tables = (call.slots, None,"),
    "states of a row are its first": ("rows.starts.unsqueeze(1) + torch", "rows.starts.unsqueeze(1) + 0 * torch"),
    "inputs of the cache not spread": ("one_later(v, ranks.spread(state.x), rows)", "one_later(v, None, rows)"),
    "tokens past the end written": ("torch.where(rows.owned.view(of_token), y, call.output)", "y"),
}
