"""Bugs to plant in selective_state_update."""

BUGS = {
    "wrong group": ("head // (HEADS // GROUPS)", "head % GROUPS"),
    "softplus always": ("        if SOFTPLUS:", "        if True:"),
    "bias dropped": ("            d += bias", "            d += 0 * bias"),
    "D dropped": ("y += u * skip", "y += 0 * u * skip"),
    "gate without sigmoid": ("y *= gate * tl.sigmoid(gate)", "y *= gate"),
    "decay with the wrong sign": ("tl.exp(a * d)", "tl.exp(-a * d)"),
    "output from the old state": ("tl.sum(s * c[None, :]", "tl.sum((s - (b[None, :] * d) * u[:, None]) * c[None, :]"),
    "state not written": ("    if num_accepted_tokens is None:\n        if", "    if False:\n        if"),
    "write slots ignored": ("        if write_slots is None:", "        if True:"),
    "null destination written": ("if is_slot(target, null_slot, slot_count):", "if is_slot(target, -1, slot_count):"),
    "null rows not zeroed": ("tl.zeros([BLOCK], tl.float32)", "tl.full([BLOCK], 1.0, tl.float32)"),
    "null slot ignored": ("slots_stride, null_slot, slot_count)", "slots_stride, -1, slot_count)"),
    "accepted column off by one": ("slots_columns) - 1", "slots_columns - 1)"),
    "state rounded between tokens": ("u[:, None]\n", "u[:, None]\n        s = s.to(tl.bfloat16).to(tl.float32)\n"),
    "first token only": ("    for t in range(tokens):\n        token", "    for t in range(1):\n        token"),
}

ROUNDING_BUGS = {
    "rounded to the nearest": ("s = _rounded(", "_rounded("),
    "every number has the first word": (
        "tl.join(tl.join(r0, r2), tl.join(r1, r3))",
        "tl.join(tl.join(r0, r0), tl.join(r0, r0))",
    ),
    "words in another order": (
        "tl.join(tl.join(r0, r2), tl.join(r1, r3))",
        "tl.join(tl.join(r0, r1), tl.join(r2, r3))",
    ),
    "the row's words": ("rounding_seed, target,", "rounding_seed, row,"),
    "the source's words": ("rounding_seed, target,", "rounding_seed, source,"),
    "one channel's words": ("channel[:, None].to(tl.uint32)", "(0 * channel)[:, None].to(tl.uint32)"),
    "the head forgotten": ("source, of_x, WIDTH", "source, channel, WIDTH"),
    "rounds ignored": ("            ROUNDS,\n        )", "            10,\n        )"),
    "biased towards zero": ("(r >> 8)", "(r >> 9)"),
    "subnormals like the others": ("tl.maximum(exponent, 113)", "tl.maximum(exponent, 10)"),
    "the sign forgotten": ("| (bits & 0x80000000)", ""),
}
"""Bugs of stochastic rounding: an error budget lets any neighbour pass, so tests/test_rounding.py catches these."""

CPP_BUGS = {
    "wrong group": ("group = head[0] / (heads / groups)", "group = 0"),
    "softplus always": ("if (is_softplus)", "if (true)"),
    "bias dropped": ("if (bias) d += added", "if (false) d += added"),
    "D dropped": ("if (D) y +=", "if (false) y +="),
    "gate dropped": ("if (z) y *=", "if (false) y *="),
    "output from the old state": ("y += now * some(c + j)", "y += some(s + j) * some(c + j)"),
    "state not written": ("if (slot >= 0) state.write", "if (slot >= 99) state.write"),
    "write slots ignored": ("store(write_slots.table ? write_slots.at(row) : source,", "store(source,"),
    "null rows not zeroed": ("const float zeros[LANES] = {};", "const float zeros[LANES] = {1};"),
    "accepted column off by one": ("accepted.at(row) - 1, 0)", "accepted.at(row), 0)"),
    "numbers beyond the last of a state": (
        "std::fill(to + dstate, to + padded, 0.0f)",
        "std::fill(to + dstate, to + padded, 1.0f)",
    ),
    "one head for a block of several": (
        "const bool one_head = head[0] == head[width - 1]",
        "const bool one_head = true",
    ),
    "first token only": ("t < length; t++) {\n        const float d", "t < 1; t++) {\n        const float d"),
}
