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
    "scale not stored": ("    tl.store(state_scale + slot", "    tl.store(state_scale + 0 * slot"),
    "scale of another channel": ("+ channel.to(tl.int64) * scale_dim_stride", "+ 0 * channel.to(tl.int64)"),
}

ROUNDING_BUGS = {
    "rounded to the nearest": ("_rounded(s, words, 10, 113)", "_rounded(s, None, 10, 113)"),
    "every number has the first word": (
        "tl.join(tl.join(r0, r2), tl.join(r1, r3))",
        "tl.join(tl.join(r0, r0), tl.join(r0, r0))",
    ),
    "words in another order": (
        "tl.join(tl.join(r0, r2), tl.join(r1, r3))",
        "tl.join(tl.join(r0, r1), tl.join(r2, r3))",
    ),
    "the row's words": ("else _words(s, rounding_seed, slot,", "else _words(s, rounding_seed, slot * 0,"),
    "the source's words": ("s, ssm_state, target, slot_stride", "s, ssm_state, source, slot_stride"),
    "one channel's words": ("channel[:, None].to(tl.uint32)", "(0 * channel)[:, None].to(tl.uint32)"),
    "the head forgotten": ("rounding_seed, of_x, WIDTH", "rounding_seed, channel, WIDTH"),
    "rounds ignored": ("        ROUNDS,\n    )", "        10,\n    )"),
    "biased towards zero": ("(r >> 8)", "(r >> 9)"),
    "subnormals like the others": ("tl.maximum(exponent, LEAST)", "tl.maximum(exponent, MANTISSA)"),
    "the sign forgotten": ("| (bits & 0x80000000)", ""),
}
"""Bugs of stochastic rounding: an error budget lets any neighbour pass, so tests/test_rounding.py catches these."""

NARROW_BUGS = {
    "cut off, not rounded": ("(steps + 12582912.0) - 12582912.0", "tl.floor(steps)"),
    "one scale for all rows": (
        "axis=1)\n        is_byte",
        "axis=1)\n        size = size * 0 + tl.max(size, axis=0)\n        is_byte",
    ),
    "a scale for half of the range": ("448.0 if is_byte else 32767.0", "224.0 if is_byte else 16383.0"),
    "infinities taken for numbers": ("finite = size < 0x7F800000", "finite = size < 0x7FF00000"),
    "seed not used": ("_rounded(q, words, 15, 142)", "_rounded(q, None, 15, 142)"),
    "8-bit seed not used": ("_to_byte(q, words, NATIVE)", "_to_byte(q, None, NATIVE)"),
    "8-bit subnormals lost": ("tl.abs(q) * 512.0", "tl.abs(q) * 0.0"),
    "8-bit subnormals misread": ("0.001953125", "0.00390625"),
    "8-bit signs lost": ("(bits >> 24) & 0x80", "(bits >> 24) & 0x00"),
    "8-bit signs misread": ("byte >= 0x80, -wide, wide", "byte >= 0x80, wide, wide"),
    "another smallest scale": ("scale, 1.1754943508222875e-38", "scale, 1e-30"),
}
"""Bugs of narrow states, which tests/test_narrow.py catches, bit by bit."""

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
