"""Bugs to plant in short_conv_mixing."""

BUGS = {
    "prefills in the slots of decodes": ("first[here]", "first[:prefills]"),
    "B and C swapped": ("B, C, x = call", "C, B, x = call"),
    "accepted tokens ignored": ("accepted = plan.num_accepted_tokens[:decodes]", "accepted = None"),
    "an activation": ("y, silu=False", "y"),
    "padding not zeroed": ("batch.clear_rest(call.output)", "pass"),
    "prefills read decodes' tokens": ("slice(decode_tokens + read, decode_tokens + read", "slice(read, read"),
    "prefills' tokens counted from the first decode": (
        "computed = plan.prefill_cu_seqlens",
        "computed = plan.cu_seqlens",
    ),
    "initial states of the decodes": ("initial[here]", "initial[:prefills]"),
    "write slots ignored": ("if targets is None else targets[here]", "if True else targets"),
    "null slot ignored": ("null_slot = PlanTensors.of(call), call.null_slot", "null_slot = PlanTensors.of(call), -1"),
    "x convolved without its gate": ("mixed = B * x", "mixed = x.contiguous()"),
    "not gated after the convolution": ("C.to(torch.promote_types(C.dtype, out.dtype))", "torch.ones_like(y)"),
    "the first rows' gate for all": ("(C.dtype, out.dtype)), y", "(C.dtype, out.dtype))[:1], y"),
    "convolution's bias dropped": ("weight=weight, bias=bias", "weight=weight, bias=None"),
}
