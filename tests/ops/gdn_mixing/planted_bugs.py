"""Bugs to plant in gdn_mixing."""

BUGS = {
    "prefills in the slots of decodes": ("first[here]", "first[:prefills]"),
    "prefills read decodes' tokens": ("slice(decode_tokens + read, decode_tokens + read", "slice(read, read"),
    "initial states of the decodes": ("initial[here]", "initial[:prefills]"),
    "accepted tokens ignored": ("accepted = plan.num_accepted_tokens[:decodes]", "accepted = None"),
    "write slots ignored": ("if targets is None else targets[here]", "if True else targets"),
    "null slot ignored": ("null_slot = PlanTensors.of(call), call.null_slot", "null_slot = PlanTensors.of(call), -1"),
    "padding not zeroed": ("batch.clear_rest(call.output)", "pass"),
    "padding of the gate not zeroed": ("batch.clear_rest(call.z)", "pass"),
    "gate not written": ("call.z[here].copy_(gate)", "pass"),
    "a and b swapped": ("mixed, gate, b, a = unpack", "mixed, gate, a, b = unpack"),
    "q and k swapped": ("q, k, v = by_head", "k, q, v = by_head"),
    "flat whatever the layout": ("*sizes, call.interleaved)", "*sizes, False)"),
    "prefills not normalised": (
        "ssm_state=states.states, qk_l2norm=True,",
        "ssm_state=states.states,",
    ),
    "decodes' bias dropped": ("dt_bias=call.dt_bias", "dt_bias=0 * call.dt_bias"),
    "convolution's bias dropped": ("weight=weight, bias=bias", "weight=weight, bias=None"),
    "narrow states of prompts not kept": ("states.keep()", "states.states"),
}
