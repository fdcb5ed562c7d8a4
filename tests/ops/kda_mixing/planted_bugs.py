"""Bugs to plant in kda_mixing."""

BUGS = {
    "prefills in the slots of decodes": ("first[here]", "first[:prefills]"),
    "prefills read decodes' tokens": ("slice(decode_tokens + read, decode_tokens + read", "slice(read, read"),
    "initial states of the decodes": ("initial[here]", "initial[:prefills]"),
    "accepted tokens ignored": ("accepted = plan.num_accepted_tokens[:decodes]", "accepted = None"),
    "write slots ignored": ("if targets is None else targets[here]", "if True else targets"),
    "null slot ignored": ("null_slot = PlanTensors.of(call), call.null_slot", "null_slot = PlanTensors.of(call), -1"),
    "padding not zeroed": ("batch.clear_rest(call.output)", "pass"),
    "q and k swapped": ("q, k, v = by_head", "k, q, v = by_head"),
    "prefills not normalised": ("ssm_state=states.states, qk_l2norm=True,", "ssm_state=states.states,"),
    "prefills' beta without sigmoid": ("sigmoid(rows.of(b).to(g.dtype))", "rows.of(b).to(g.dtype)"),
    "prefills' bound dropped": ("call.dt_bias, call.lower_bound)", "call.dt_bias, None)"),
    "decodes' bound dropped": ("lower_bound=call.lower_bound", "lower_bound=None"),
    "decodes' bias dropped": ("dt_bias=call.dt_bias", "dt_bias=0 * call.dt_bias"),
    "convolution's bias dropped": ("bias=bias", "bias=None"),
    "narrow states of prompts not kept": ("states.keep()", "states.states"),
}
