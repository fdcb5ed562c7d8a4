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

KERNEL_BUGS = {
    "the token before dropped": ("s += (v_before * late)", "s += 0 * (v_before * late)"),
    "weights swapped": ("early = tl.sigmoid(share) * d", "early = tl.sigmoid(-share) * d"),
    "the token before not decayed": (
        "s = s * tl.exp(log_decay(rate, d)) + (u",
        "s = (s - (v_before * late)[:, None] * k_before[None, :]) * tl.exp(log_decay(rate, d)) + (v_before * late)"
        "[:, None] * k_before[None, :] + (u",
    ),
    "turned the other way": ("tl.where(is_first, -other, other)", "tl.where(is_first, other, -other)"),
    "k of before is not kept": ("k_before = k\n", "k_before = k_before\n"),
    "v of before is not kept": ("v_before = u\n", "v_before = v_before\n"),
    "angles begin anew": ("turned(angle, half_turns(raw, d))", "turned(0 * angle, half_turns(raw, d))"),
    "rates above 0 grow": ("tl.where(rate > 0, 0.0, rate)", "rate"),
    "neighbours without their bias": ("other_b += more_of_other_k", "other_b += 0.0"),
    "q without its bias": ("c += more_q", "c += 0.0"),
    "wrong group": ("of_group = head // (HEADS // GROUPS) * DSTATE", "of_group = head % GROUPS * DSTATE"),
    "all pairs turn": ("turns = pair < ANGLES", "turns = entry < DSTATE"),
    "half a turn is lost": ("2.0 * tl.floor(turn * 0.5 + 0.5)", "tl.floor(turn)"),
    "quarters mixed up": ("(quarter == 1.0) | (quarter == 2.0)", "quarter == 2.0"),
    "skip dropped": ("y += u * skip", "y += 0.0"),
    "gate not multiplied": ("return y * (tl.maximum(z, -88.0) * tl.sigmoid(z))", "return y * tl.sigmoid(z)"),
    "accepted tokens off by one": ("tl.maximum(accepted, 1), slots_columns) - 1", "tl.maximum(accepted, 1), 1) - 1"),
    "states of a row all in one column": ("write_slots + row * write_stride + t)", "write_slots + row * write_stride)"),
    "null slot ignored": ("slots_stride, null_slot, slot_count)", "slots_stride, -1, slot_count)"),
    "states not moved": ("stored = is_slot(target, null_slot, slot_count)", "stored = False"),
    "write slots ignored": (
        "target = tl.load(write_slots + row * write_stride).to(tl.int64)\n",
        "target = source\n",
    ),
    "angle not stored": ("of_angle, angle, is_angle)", "of_angle, angle, is_angle & (angle > 9))"),
}
"""Of the Triton kernel."""
