"""Bugs to plant in mamba_mixing."""

BUGS = {
    "prefills in the slots of decodes": ("first[here]", "first[:prefills]"),
    "prefills read decodes' tokens": ("slice(decode_tokens + read, decode_tokens + read", "slice(read, read"),
    "initial states of the decodes": ("initial[here]", "initial[:prefills]"),
    "accepted tokens ignored": ("accepted = plan.num_accepted_tokens[:decodes]", "accepted = None"),
    "write slots ignored": ("if targets is None else targets[here]", "if True else targets"),
    "padding not zeroed": ("batch.clear_rest(call.output)", "pass"),
    "x and gate swapped": ("x, z = call.projected.split", "z, x = call.projected.split"),
    "B and C swapped": ("low_dt, B, C = low", "low_dt, C, B = low"),
    "norms left out": ("part.copy_(", "("),
    "norm after the projection of dt": (
        "    torch.mm(low_dt, call.dt_proj_weight.t(), out=dt)\n    scan(batch)",
        "    scan(batch)\n    torch.mm(low_dt, call.dt_proj_weight.t(), out=dt)",
    ),
    "another eps": ("_normalised(part, weight, call.norm_eps)", "_normalised(part, weight, 1e-6)"),
    "bias of dt dropped": ("dt_bias=call.dt_proj_bias", "dt_bias=0 * call.dt_proj_bias"),
    "D dropped": ("D=call.D", "D=None"),
    "gate dropped": ("z=rows.of(z)", "z=None"),
    "the first rows' gate for all": ("z=rows.of(z)", "z=z[: rows.of(z).shape[0]]"),
    "convolution's bias dropped": ("weight=weight, bias=bias", "weight=weight, bias=None"),
    "narrow states of prompts not kept": ("states.keep()", "states.states"),
}
