"""Bugs to plant in mamba3_mixing."""

BUGS = {
    "prefills in the slots of decodes": ("first[here]", "first[:prefills]"),
    "z of the first tokens": ("rows.of(call.z)", "call.z[: rows.tokens.stop - rows.tokens.start]"),
    "accepted tokens ignored": ("accepted = plan.num_accepted_tokens[:decodes]", "accepted = None"),
    "padding not zeroed": ("batch.clear_rest(call.output)", "pass"),
    "prefills read decodes' tokens": ("slice(decode_tokens + read, decode_tokens + read", "slice(read, read"),
    "initial states of the decodes": ("initial[here]", "initial[:prefills]"),
    "write slots ignored": ("if targets is None else targets[here]", "if True else targets"),
    "null slot ignored": ("null_slot = PlanTensors.of(call), call.null_slot", "null_slot = PlanTensors.of(call), -1"),
    "skip dropped": ('"D", "mimo_x"', '"mimo_x"'),
    "C's bias dropped": ('"C_bias", ', ""),
    "outputs not summed over the rank": (
        "getattr(call, name) for name in names}",
        'getattr(call, name) for name in names} | {"mimo_o": call.mimo_x}',
    ),
    "gate of SISO dropped": ("None if call.z is None else", "None if call.z is None or call.mimo_z is None else"),
}
