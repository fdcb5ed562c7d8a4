"""Bugs to plant in gdn_mixing."""

BUGS = {
    "prefills in the slots of decodes": ("first[decodes:rows]", "first[:prefills]"),
    "prefills read decodes' tokens": ("slice(decode_tokens, total)", "slice(0, prefill_tokens)"),
    "initial states of the decodes": ("plan.has_initial_state[decodes:rows]", "plan.has_initial_state[:prefills]"),
    "accepted tokens ignored": ('options["num_accepted_tokens"] = plan.num_accepted_tokens[:decodes]', "pass"),
    "null slot ignored": ('"null_slot": null_slot}', '"null_slot": -1}'),
    "padding not zeroed": ("batch.clear_rest(call.output)", "pass"),
    "padding of the gate not zeroed": ("batch.clear_rest(call.z)", "pass"),
    "gate not written": ("call.z[here].copy_(gate)", "pass"),
    "a and b swapped": ("mixed, gate, b, a = unpack", "mixed, gate, a, b = unpack"),
    "q and k swapped": ("q, k, v = by_head", "k, q, v = by_head"),
    "flat whatever the layout": ("*sizes, call.interleaved)", "*sizes, False)"),
    "prefills not normalised": (
        "qk_l2norm=True, out=rows.of(call.output), **rows.options)\n\n    def step",
        "out=rows.of(call.output), **rows.options)\n\n    def step",
    ),
    "decodes' bias dropped": ('"dt_bias": call.dt_bias}', '"dt_bias": 0 * call.dt_bias}'),
    "convolution's bias dropped": ("call.conv_weight, call.conv_bias", "call.conv_weight, None"),
}
