"""Bugs to plant in mamba2_mixing."""

BUGS = {
    "prefills in the slots of decodes": ("first[here]", "first[:prefills]"),
    "prefills read decodes' tokens": ("slice(decode_tokens + read, decode_tokens + read", "slice(read, read"),
    "prefills' tokens counted from the first decode": (
        "computed = plan.prefill_cu_seqlens",
        "computed = plan.cu_seqlens",
    ),
    "initial states of the decodes": ("initial[here]", "initial[:prefills]"),
    "accepted tokens ignored": ("accepted = plan.num_accepted_tokens[:decodes]", "accepted = None"),
    "one column when speculating": ("DecodeArgs(plan.slots[:decodes]", "DecodeArgs(first[:decodes]"),
    "write slots ignored": ("if targets is None else targets[here]", "if True else targets"),
    "null slot ignored": ("null_slot = PlanTensors.of(call), call.null_slot", "null_slot = PlanTensors.of(call), -1"),
    "padding not zeroed": ("batch.clear_rest(call.output)", "pass"),
    "B and C swapped": ("x, B, C = by_head", "x, C, B = by_head"),
    "prefills' bias dropped": (
        "dt_bias=call.dt_bias,\n                dt_softplus=True",
        "dt_softplus=True",
    ),
    "decodes' bias dropped": ("dt_bias=None if limited else call.dt_bias", "dt_bias=None"),
    "decodes' limits ignored": (".clamp(call.dt_min, call.dt_max)", ""),
    "prefills' limits ignored": ("dt_min=call.dt_min,\n                dt_max=call.dt_max,", ""),
    "convolution's bias dropped": ("weight=weight, bias=bias", "weight=weight, bias=None"),
    "narrow states of prompts not kept": ("states.keep()", "states.states"),
}
