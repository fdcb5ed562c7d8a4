"""Bugs to plant in mamba3_state_update."""

BUGS = {
    "the token before dropped": ("two(v_before *", "two(0 * v_before *"),
    "weights swapped": ("(1 - early) * dt / LEAST", "early * dt / LEAST"),
    "angles not added": ("near_zero(angle + math.pi", "near_zero(math.pi"),
    "padding not zeroed": ("torch.where(ends.is_active.view(-1, 1, 1), result, 0)", "result"),
    "B's bias dropped": ("call.B, call.B_bias", "call.B, None"),
    "C's bias dropped": ("call.C, call.C_bias", "call.C, None"),
    "k of before turned again": ("two(k_before, k)", "two(rotate(k_before, angle), k)"),
    "q is k": ("\n    early", "\n    q = k\n    early"),
    "skip dropped": ("x, call.D, call.z", "x, None, call.z"),
    "gate dropped": ("x, call.D, call.z", "x, call.D, None"),
    "null slot ignored": ("null_slot=call.null_slot", "null_slot=-1"),
    "k not kept": ("(call.k_state, k), ", ""),
}
