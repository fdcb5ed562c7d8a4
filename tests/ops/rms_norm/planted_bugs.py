"""Bugs to plant in rms_norm."""

BUGS = {
    "residual dropped": ("h += residual.to(tl.float32)", "h += residual.to(tl.float32) * 0"),
    "gate always first": ("        if not NORM_FIRST:", "        if True:"),
    "weight of the first group": ("weight_inner = size if call.groups > 1 else 0", "weight_inner = 0"),
    "mean of the block": ("axis=1) / SIZE", "axis=1) / BLOCK"),
    "sum, not mean": ("axis=1) / SIZE", "axis=1)"),
    "eps outside of the root": ("1.0 / tl.sqrt(mean + eps)", "1.0 / (tl.sqrt(mean) + eps)"),
    "eps doubled": ("mean + eps", "mean + 2 * eps"),
    "gate always silu": ("    if SIGMOID:", "    if False:"),
    "gate inverted": ("silu(gate, BITS)", "-silu(-gate, BITS)"),
    "mean taken away": (
        "tl.sum(h * h, axis=1) / SIZE",
        "tl.sum(h * h, axis=1) / SIZE - (tl.sum(h, axis=1) / SIZE) * (tl.sum(h, axis=1) / SIZE)",
    ),
    "weight dropped": ("h *= weight.to(tl.float32)", "h *= weight.to(tl.float32) * 0 + 1"),
    "heads of the first token": ("(row // inner).to(tl.int64)", "(row // inner * 0).to(tl.int64)"),
    "output not written back": ("            _copy_back(t, asked)\n", "            pass\n"),
    "gate's distance taken for x's": ("outer * gate_outer + part * gate_inner", "outer * x_outer + part * x_inner"),
}
