"""Bugs to plant in mamba_mixing."""

BUGS = {
    "prefills in the slots of decodes": ("first[decodes:rows]", "first[:prefills]"),
    "prefills read decodes' tokens": ("slice(decode_tokens, total)", "slice(0, prefill_tokens)"),
    "initial states of the decodes": ("plan.has_initial_state[decodes:rows]", "plan.has_initial_state[:prefills]"),
    "accepted tokens ignored": ('options["num_accepted_tokens"] = plan.num_accepted_tokens[:decodes]', "pass"),
    "padding not zeroed": ("batch.clear_rest(call.output)", "pass"),
    "x and gate swapped": ("x, z = call.projected.split", "z, x = call.projected.split"),
    "B and C swapped": ("parts = dt, B, C = low", "parts = dt, C, B = low"),
    "norms left out": ("part.copy_(", "("),
    "norm after the projection of dt": (
        "    torch.mm(dt, call.dt_proj_weight.t(), out=delta)\n    scan(*(op.call_undispatched for op in scans))",
        "    scan(*(op.call_undispatched for op in scans))\n    torch.mm(dt, call.dt_proj_weight.t(), out=delta)",
    ),
    "another eps": ("rms_norm(part, weight, call.norm_eps)", "rms_norm(part, weight, 1e-6)"),
    "prefills' bias dropped": ('"dt_bias": call.dt_proj_bias, ', ""),
    "decodes' bias dropped": ('"dt_bias": call.dt_proj_bias,\n', "\n"),
    "prefills' D dropped": ('{"D": call.D, "z": prefills.of(z)', '{"z": prefills.of(z)'),
    "decodes' gate dropped": ('"z": decodes.of(z),\n', "\n"),
    "convolution's bias dropped": ("call.conv_weight, call.conv_bias", "call.conv_weight, None"),
}
