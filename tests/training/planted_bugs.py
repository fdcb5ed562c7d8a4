"""Bugs to plant in the backward kernels, by op."""

BUGS = {
    "causal_conv1d": {
        "silu's slope without its second part": ("opened * (1.0 + before * (1.0 - opened))", "opened"),
        "taps not turned around": ("taps[HISTORY - k] * later[k]", "taps[k] * later[k]"),
        "weights' gradient counts neighbours": ("own = tl.where(token < end, grad, 0.0)", "own = grad"),
        "final states forgotten": ("if grad_final_ptr is not None:", "if False:"),
        "tail not zeroed": ("clear(call.grad_x)", "call.grad_x.fill_(1.0)"),
    },
    "mamba_chunk_scan": {
        "state before the chunk not read": ("tl.dot(g, state, total", "tl.dot(g, state * 0.0, total"),
        "one head of a group": ("            pairs += (", "            pairs = ("),
        "softplus without its slope": ("grad_d *= tl.sigmoid(raw)", "grad_d *= 1.0"),
        "limits without effect": ("& (unlimited >= dt_min)", "& (unlimited >= -1e30)"),
        "decay reaches the token itself": ("> place[:, None], later", ">= place[:, None], later"),
        "final states forgotten": ("if final is not None:", "if False:"),
        "what is read of states forgotten": ("read * since)", "read * 0.0)"),
        "decay of a whole chunk forgotten": ("reach += whole *", "reach += 0.0 *"),
        "all pairs are one token with itself": ("tl.where(is_same, pairs, 0.0)", "pairs"),
        "D not in x": ("exact * skip[None, :], of", "exact * 0.0, of"),
        "tail not zeroed": ("clear(gradient)  # of tokens", "gradient.fill_(1.0)  # of tokens"),
    },
}
